// The block allocator: sequences that own, share and give back blocks of one pool.
//
// Plain C++ without locks, tensors or Python: binding.cpp adds those. Every operation is batched,
// and one that throws has changed nothing. Sequences are the handles of sequences.h. All layer
// groups of a sequence have the same length; each has its own table, and all draw from one pool.
// With a prefix cache, blocks that nobody uses any more keep their content until they are needed.
// Files: allocator.cpp (life of a sequence), append.cpp (growth), prefix.cpp (reuse of prefixes),
// views.cpp (what kernels read), stats.cpp, integrity.cpp, snapshot.cpp. Next: append.cpp, then
// batch.h and prefix_tree.h.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "allocator/block_pool.h"
#include "allocator/block_size.h"
#include "allocator/prefix_cache.h"
#include "allocator/sequences.h"

namespace pykvcache {

using Ints = std::span<const int64_t>;

struct CopyPair {
  int64_t src, dst;  // block ids
};
using Copies =
    std::vector<std::vector<CopyPair>>;  // [group][pair]; empty when there is none at all

// What a layer group still reads of the past when the next tokens come; at most one of the two.
struct Reach {
  int32_t window = 0;  // counts the current token; 0: everything
  int32_t chunk = 0;   // a token sees its own chunk; 0: everything
};

struct Stats;

class Allocator {
 public:
  // `layers` has the number of layers of each group; `tag` tells allocators of a process apart.
  Allocator(int64_t num_blocks, int64_t block_size, Ints layers, uint32_t tag);

  // Turns the prefix cache on; before there are sequences. `windows` has that of each group.
  void cache_prefixes(Ints windows);

  // Life of a sequence.
  void allocate(Ints lengths, int64_t* handles);
  void fork(Ints handles, int64_t n, int64_t* children);  // [B * n], children of a row together
  void select(Ints handles, Ints index, int64_t* selected);
  void truncate(Ints handles, Ints lengths);
  void release_before(Ints handles, Ints positions, int64_t group);
  void free(Ints handles);

  // Growth.
  Copies append(Ints handles, Ints counts);
  void reserve(Ints handles, Ints capacities);
  void grow(int64_t num_blocks);

  // Reuse. Prompts are rows of `tokens`, one after the other; so are those that record() takes.
  void allocate_cached(Ints tokens, Ints counts, Ints salts, int64_t* handles, int64_t* hits);
  void lookup(Ints tokens, Ints counts, Ints salts, int64_t* hits);
  void record(Ints handles, Ints tokens, Ints counts);
  void set_priority(Ints handles, Ints priorities);
  void forget_prefixes();

  // Pins hold blocks although no sequence does; a pinned block is copied before it is written.
  void pin(Ints blocks);
  void unpin(Ints blocks);
  std::vector<int64_t> pin_sequences(Ints handles);

  // What kernels read.
  void lengths(Ints handles, int32_t* out);
  int64_t block_table(Ints handles, int64_t group, std::vector<int32_t>& out);  // returns columns
  void slot_mapping(Ints handles, Ints counts, int64_t group, int64_t width,
                    std::vector<int64_t>& out);

  Stats stats() const;
  void check_integrity() const;
  std::string snapshot() const;
  void restore(const std::string& bytes);

  int64_t num_blocks() const { return pool_.num_blocks(); }
  // Free blocks and cached ones: all that can be given out.
  int64_t num_free() const { return pool_.num_free() + num_cached(); }
  int64_t num_cached() const { return prefixes_ ? prefixes_->num_cached() : 0; }
  int64_t peak() const { return pool_.peak(); }
  int64_t num_sequences() const { return store_.num_live(); }
  int32_t block_size() const { return block_size_; }
  int32_t groups() const { return store_.groups(); }

  // Adds to a reference count behind the allocator's back; only for tests of check_integrity().
  void damage_refs(int32_t block) { pool_.share(block); }
  // Makes all prefixes collide; only for tests, before anything is recorded.
  void collide_hashes();

 private:
  friend class Batch;      // batch.cpp: append in two halves, and the tables between
  friend class Inspector;  // stats.cpp, integrity.cpp
  friend class Archive;    // snapshot.cpp

  // An append that was checked and can no longer fail; it is followed by commit() or roll_back().
  struct Plan {
    struct Row {
      uint32_t slot;
      int32_t length;      // after the append
      int32_t begin, end;  // table entries that are written
    };
    struct Copy {
      uint32_t slot;
      int32_t group, index;
    };
    struct Growth {
      uint32_t slot;
      int32_t group, entries;
    };
    struct Release {
      uint32_t slot;
      int32_t group, dead;
    };
    void clear();

    std::vector<Row> rows;
    std::vector<Copy> copies;         // entries to replace by a copy
    std::vector<Copy> overwrites;     // entries whose content only the prefix cache wants to keep
    std::vector<Growth> growths;      // tables that get longer
    std::vector<Release> releases;    // tables whose head leaves the window
    std::vector<int32_t> unshared;    // blocks that lost a reference while planning
    std::vector<int32_t> given_back;  // those that lost their last
    std::vector<int32_t> kept;        // overwritten ones of which there is a copy now
    int64_t needed = 0;               // new blocks
    bool keeps_overwritten = false;   // there are blocks for copies of those, too
    int32_t max_blocks = 0;           // longest table afterwards
  };

  void plan_append(Ints handles, Ints counts, std::span<const Reach> reach, const char* op);
  void plan_release(uint32_t slot, int32_t group, Reach reach);
  void plan_copies(uint32_t slot, int32_t group, int32_t begin, int32_t end);
  void plan_growth(uint32_t slot, int32_t group, int32_t entries);
  void plan_writes(int32_t group);
  bool overwrites(uint32_t slot, int32_t block) const;
  int32_t replace(const Plan::Copy& copy, Copies& copies);
  void roll_back();
  Copies commit();

  void check_available(int64_t needed, int64_t available, const char* op);
  void check_group(int64_t group) const;
  PrefixCache& prefixes(const char* op);
  void check_prompts(const char* op, Ints tokens, Ints counts, Ints salts) const;
  void share_match(uint32_t slot, std::span<const int32_t> nodes, int32_t length);
  void record_row(uint32_t slot, Ints tokens);
  void record_step(Ints tokens);
  void add_block(uint32_t slot, uint64_t hash);
  void end_trace(uint32_t slot);
  void drop_nodes(uint32_t slot);
  std::span<int32_t> entries_at(uint32_t slot, int32_t index);
  uint32_t open_sequence(int64_t salt = 0);
  void start_without_prefixes(const PrefixCache& old);
  void make_room(int64_t n) {
    if (prefixes_ && n > pool_.num_free()) prefixes_->make_room(n, pool_);
  }
  int64_t num_used() const { return pool_.num_used() - num_cached(); }
  void drop_block(int32_t block);
  void drop_blocks(Table& table, int64_t begin, int64_t end);
  void drop_sequence(uint32_t slot);
  void copy_tables(uint32_t from, uint32_t to);

  struct Counters {
    int64_t copies = 0, forks = 0, refusals = 0, steps = 0, block_steps = 0;
  };

  BlockSize block_size_;
  std::vector<int32_t> layers_;  // [group]
  BlockPool pool_;
  SequenceStore store_;
  std::optional<PrefixCache> prefixes_;
  std::vector<Trace> traces_;  // [slot], with a prefix cache
  Counters counters_;
  int64_t refused_ = 0;  // size of the largest request that waits for blocks, 0: none
  int64_t restores_ = 0;
  Plan plan_;
  struct Filled {
    uint32_t slot;
    uint64_t hash;
  };
  std::vector<Filled> filled_;    // scratch
  std::vector<uint32_t> slots_;   // scratch
  std::vector<int32_t> nodes_;    // scratch
  std::vector<int32_t> entries_;  // scratch, [group]
};

// Throws unless it is a number of query tokens, or 0 for packed rows.
void check_width(const char* op, int64_t width);

// Throws unless there are `rows` values, each 0 to max.
void check_counts(const char* op, const char* name, Ints values, size_t rows, int64_t max);

}  // namespace pykvcache
