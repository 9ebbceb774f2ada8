// Sequences and their block tables, in a slot map behind 64-bit handles.
//
// A handle is (tag | generation | slot): the slot finds the sequence, the generation is new for
// every sequence that an allocator creates, and the tag differs between allocators of a process, so
// a stale or foreign handle never resolves. Slots and the memory of their tables are reused. Next:
// allocator.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "allocator/errors.h"

namespace pykvcache {

// Blocks of one sequence in one layer group. Entry i covers positions [i * block_size, (i + 1) *
// block_size); entries whose positions all lie below `dead` were released and are -1.
struct Table {
  std::vector<int32_t> blocks;
  int32_t dead = 0;    // positions below it will not be attended again
  uint32_t edits = 0;  // counts changes other than growth at the end
};

struct Sequence {
  int64_t handle = 0;  // 0: the slot is free
  int32_t length = 0;  // tokens
  uint64_t visit = 0;  // the last call that named this sequence, to find duplicates in a batch
};

class SequenceStore {
 public:
  static constexpr int kSlotBits = 24, kTagShift = 52;
  static constexpr uint32_t kMaxTag = (1u << (63 - kTagShift)) - 1;

  SequenceStore(int32_t groups, uint32_t tag) : groups_(groups), tag_(tag) {}

  int32_t groups() const { return groups_; }
  int64_t num_live() const {
    return static_cast<int64_t>(sequences_.size()) - static_cast<int64_t>(free_slots_.size());
  }
  uint32_t num_slots() const { return static_cast<uint32_t>(sequences_.size()); }
  Sequence& sequence(uint32_t slot) { return sequences_[slot]; }
  const Sequence& sequence(uint32_t slot) const { return sequences_[slot]; }
  Table& table(uint32_t slot, int32_t group) { return tables_[slot * size_t(groups_) + group]; }
  const Table& table(uint32_t slot, int32_t group) const {
    return tables_[slot * size_t(groups_) + group];
  }

  // Makes room for n more sequences, so that the next n open() calls cannot fail.
  void reserve(int64_t n) {
    const int64_t extra = n - static_cast<int64_t>(free_slots_.size());
    const size_t wanted = sequences_.size() + (extra > 0 ? extra : 0);
    if (wanted > kMaxSlots) bad_argument("at most ", kMaxSlots, " sequences may be alive at once");
    if (wanted > sequences_.capacity()) {
      sequences_.reserve(std::max(wanted, 2 * sequences_.capacity()));
      tables_.reserve(sequences_.capacity() * groups_);
      free_slots_.reserve(sequences_.capacity());
    }
  }

  // A new, empty sequence; returns its slot.
  uint32_t open() {
    uint32_t slot = num_slots();
    if (free_slots_.empty()) {
      sequences_.emplace_back();
      tables_.resize(tables_.size() + groups_);
    } else {
      slot = free_slots_.back();
      free_slots_.pop_back();
    }
    sequences_[slot].length = 0;
    renew(slot);
    return slot;
  }

  // Gives the sequence in a slot a new handle; the old one becomes stale.
  int64_t renew(uint32_t slot) {
    const int64_t handle = (int64_t(tag_) << kTagShift) | (next_generation_ << kSlotBits) | slot;
    next_generation_ = next_generation_ == kMaxGeneration ? 1 : next_generation_ + 1;
    return sequences_[slot].handle = handle;
  }

  // The caller has dropped the blocks.
  void close(uint32_t slot) {
    sequences_[slot].handle = 0;
    for (int32_t group = 0; group < groups_; ++group) {
      table(slot, group).blocks.clear();
      table(slot, group).dead = 0;
    }
    free_slots_.push_back(slot);
  }

  // Never gives out a handle again that `other` gave out.
  void continue_after(const SequenceStore& other) {
    if (tag_ == other.tag_) next_generation_ = std::max(next_generation_, other.next_generation_);
  }

  // True and the slot when the handle names a live sequence.
  bool find(int64_t handle, uint32_t* slot) const {
    *slot = static_cast<uint32_t>(handle) & (kMaxSlots - 1);
    return *slot < sequences_.size() && sequences_[*slot].handle == handle && handle != 0;
  }

  // True for a handle that was given out here and whose sequence is gone.
  bool is_stale(int64_t handle) const {
    const int64_t generation = (handle >> kSlotBits) & kMaxGeneration;
    uint32_t slot;
    return handle > 0 && uint32_t(handle >> kTagShift) == tag_ && !find(handle, &slot) &&
           generation > 0 && generation < next_generation_;
  }

  // Slots of a batch; throws UnknownSequence for a handle that does not resolve. With `distinct`, a
  // handle named twice is a bad argument.
  void resolve(std::span<const int64_t> handles, bool distinct, const char* op,
               std::vector<uint32_t>& slots) {
    slots.resize(handles.size());
    ++visit_;
    for (size_t row = 0; row < handles.size(); ++row) {
      if (!find(handles[row], &slots[row])) [[unlikely]]
        fail_unknown(handles[row], row, op);
      Sequence& sequence = sequences_[slots[row]];
      if (distinct && sequence.visit == visit_) [[unlikely]]
        fail_repeated(handles[row], row, op);
      sequence.visit = visit_;
    }
  }

 private:
  friend class Inspector;  // stats.cpp, integrity.cpp
  friend class Archive;    // snapshot.cpp

  [[noreturn]] void fail_unknown(int64_t handle, size_t row, const char* op) const {
    throw UnknownSequence(message(
        op, ": sequence ", handle, " in row ", row,
        is_stale(handle) ? " was freed or replaced before" : " does not belong to this allocator"));
  }
  [[noreturn]] static void fail_repeated(int64_t handle, size_t row, const char* op) {
    bad_argument(op, ": sequence ", handle, " in row ", row, " is in the batch twice");
  }

  static constexpr uint32_t kMaxSlots = uint32_t{1} << kSlotBits;
  static constexpr int64_t kMaxGeneration = (int64_t{1} << (kTagShift - kSlotBits)) - 1;

  int32_t groups_;
  uint32_t tag_;  // 1 to kMaxTag
  int64_t next_generation_ = 1;
  uint64_t visit_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<Table> tables_;  // [slot][group]
  std::vector<uint32_t> free_slots_;
};

}  // namespace pykvcache
