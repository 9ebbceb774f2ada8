// What the prefix index knows of each block: the node that it belongs to, its priority, and its
// place among the blocks that could be evicted.
//
// Evictable blocks form one doubly linked list a priority, oldest first, threaded through a flat
// array; a bitmap finds the lowest priority in use. Read next: prefix_tree.h.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

namespace pykvcache {

class BlockMarks {
 public:
  static constexpr int32_t kNone = -1;
  static constexpr int32_t kLowest = -128, kHighest = 127;  // priorities

  explicit BlockMarks(int64_t num_blocks) : marks_(num_blocks) {}

  int32_t node(int64_t block) const { return marks_[block].node; }
  void set_node(int32_t block, int32_t node) { marks_[block].node = node; }
  int32_t priority(int64_t block) const { return marks_[block].priority; }
  // Not while the block is queued.
  void set_priority(int32_t block, int32_t priority) { marks_[block].priority = priority; }
  void prefetch(int32_t block) const { __builtin_prefetch(&marks_[block]); }

  // Evictable blocks.
  int64_t num_queued() const { return num_queued_; }

  // The block becomes evictable, the last of its priority.
  void queue(int32_t block) {
    List& list = list_of(block);
    Mark& mark = marks_[block];
    mark.older = list.newest;
    mark.newer = kNone;
    (list.newest == kNone ? list.oldest : marks_[list.newest].newer) = block;
    list.newest = block;
    set_used(mark.priority, true);
    ++num_queued_;
  }

  void unqueue(int32_t block) {
    List& list = list_of(block);
    const Mark& mark = marks_[block];
    (mark.older == kNone ? list.oldest : marks_[mark.older].newer) = mark.newer;
    (mark.newer == kNone ? list.newest : marks_[mark.newer].older) = mark.older;
    if (list.oldest == kNone) set_used(mark.priority, false);
    --num_queued_;
  }

  // The block to evict first; there must be one.
  int32_t victim() const {
    size_t word = 0;
    while (used_[word] == 0) ++word;
    return lists_[64 * word + std::countr_zero(used_[word])].oldest;
  }
  // The block that is evicted after this one, if nothing changes; may be kNone.
  int32_t newer(int32_t block) const { return marks_[block].newer; }

  void grow(int64_t num_blocks) { marks_.resize(num_blocks); }
  size_t bytes() const { return marks_.capacity() * sizeof(Mark); }

 private:
  friend class PrefixInspector;  // prefix_integrity.cpp

  struct Mark {
    int32_t older = kNone, newer = kNone;
    int32_t node = kNone;
    int32_t priority = 0;
  };
  struct List {
    int32_t oldest = kNone, newest = kNone;
  };
  static constexpr int32_t kLevels = kHighest - kLowest + 1;

  List& list_of(int32_t block) { return lists_[marks_[block].priority - kLowest]; }
  void set_used(int32_t priority, bool used) {
    const int32_t level = priority - kLowest;
    const uint64_t bit = uint64_t{1} << (level % 64);
    used_[level / 64] = used ? used_[level / 64] | bit : used_[level / 64] & ~bit;
  }

  std::vector<Mark> marks_;
  std::array<List, kLevels> lists_;
  std::array<uint64_t, kLevels / 64> used_{};  // bitmap of lists that are not empty
  int64_t num_queued_ = 0;
};

}  // namespace pykvcache
