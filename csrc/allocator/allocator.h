// The block allocator: sequences that own, share and give back blocks of one pool.
//
// Plain C++ without locks, tensors or Python: binding.cpp adds those. Every operation is batched,
// and one that throws has changed nothing. Sequences are the handles of sequences.h. All layer
// groups of a sequence have the same length; each has its own table, and all draw from one pool.
// Files: allocator.cpp (life of a sequence), append.cpp (growth), views.cpp (what kernels read),
// stats.cpp, integrity.cpp, snapshot.cpp. Next: append.cpp, then batch.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "allocator/block_pool.h"
#include "allocator/block_size.h"
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
  int64_t num_free() const { return pool_.num_free(); }
  int64_t peak() const { return pool_.peak(); }
  int64_t num_sequences() const { return store_.num_live(); }
  int32_t block_size() const { return block_size_; }
  int32_t groups() const { return store_.groups(); }

  // Adds to a reference count behind the allocator's back; only for tests of check_integrity().
  void damage_refs(int32_t block) { pool_.share(block); }

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
    std::vector<Growth> growths;      // tables that get longer
    std::vector<Release> releases;    // tables whose head leaves the window
    std::vector<int32_t> unshared;    // blocks that lost a reference while planning
    std::vector<int32_t> given_back;  // those that lost their last
    int64_t needed = 0;               // new blocks
    int32_t max_blocks = 0;           // longest table afterwards
  };

  void plan_append(Ints handles, Ints counts, std::span<const Reach> reach, const char* op);
  void plan_release(uint32_t slot, int32_t group, Reach reach);
  void plan_copies(uint32_t slot, int32_t group, int32_t begin, int32_t end);
  void plan_growth(uint32_t slot, int32_t group, int32_t entries);
  void plan_writes(int32_t group);
  void roll_back();
  Copies commit();

  void check_available(int64_t needed, int64_t available, const char* op);
  void check_group(int64_t group) const;
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
  Counters counters_;
  int64_t refused_ = 0;  // size of the largest request that waits for blocks, 0: none
  int64_t restores_ = 0;
  Plan plan_;
  std::vector<uint32_t> slots_;  // scratch
};

// Throws unless it is a number of query tokens, or 0 for packed rows.
void check_width(const char* op, int64_t width);

// Throws unless there are `rows` values, each 0 to max.
void check_counts(const char* op, const char* name, Ints values, size_t rows, int64_t max);

}  // namespace pykvcache
