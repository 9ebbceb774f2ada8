// The prefix index: which blocks hold the keys and values of which prefixes, and which of them are
// evicted first.
//
// A node of the tree has one block for each layer group. Its blocks are owned by sequences and pins
// through reference counts as all others; those that nobody refers to are "cached": they keep their
// content until the pool needs them. A node always has its blocks of groups without a window; those
// of a windowed group may be gone. When a node goes, everything below it goes, since nothing could
// lead there.
//
// Files: prefix_cache.cpp (find, own, evict), prefix_record.cpp (add); prefix.cpp has the
// allocator's operations on it. Next: traces.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "allocator/block_marks.h"
#include "allocator/block_pool.h"
#include "allocator/block_size.h"
#include "allocator/prefix_tree.h"
#include "allocator/traces.h"

namespace pykvcache {

class PrefixCache {
 public:
  static constexpr int32_t kNone = PrefixTree::kNone;

  // `windows` has that of each layer group, 0: everything.
  PrefixCache(int64_t num_blocks, BlockSize block_size, std::vector<int32_t> windows);

  // The longest prefix of a prompt whose blocks are there: the nodes that hold it, the last of them
  // perhaps only in part. Returns its tokens.
  int32_t match(std::span<const int64_t> prompt, int64_t salt, std::vector<int32_t>& nodes) const;

  // Ownership: what share() and drop() of the pool are where blocks may be cached.
  void share(int32_t block, BlockPool& pool);
  void drop(int32_t block, BlockPool& pool);
  void give_back(int32_t block, BlockPool& pool);  // has lost its last reference
  bool is_cached(int64_t block, const BlockPool& pool) const {
    return pool.refs(static_cast<int32_t>(block)) == 0 && marks_.node(block) != kNone;
  }
  int64_t num_cached() const { return marks_.num_queued(); }
  // Evicts until the pool has n free blocks. Requires that so many are free or cached.
  void make_room(int64_t n, BlockPool& pool);

  // Whether a known prefix would be lost if tokens of a block from `offset` on were overwritten.
  bool holds(int32_t block, int32_t offset) const {
    const int32_t node = marks_.node(block);
    return node != kNone && tree_.node(node).count > offset;
  }
  // Makes the prefixes that run through a block unknown; it has an owner.
  void forget_block(int32_t block, BlockPool& pool);
  // Makes all prefixes unknown, also what sequences have recorded so far.
  void forget(BlockPool& pool);

  // Recording. `entries` are the sequence's blocks of one index, [group]; those that the index has
  // already take the place of the sequence's own, which are dropped. Returns whether any did.
  bool add_block(Trace& trace, uint64_t hash, std::span<int32_t> entries, BlockPool& pool);
  // Hash of a full tail, and memory that add_block() will read for it.
  uint64_t hash_of(const Trace& trace) const;
  void prefetch(uint64_t hash) const { tree_.prefetch_bucket(hash); }
  // The end of a sequence: its last, partly filled block becomes known unless all of it is.
  void add_tail(Trace& trace, std::span<const int32_t> entries, BlockPool& pool);
  // Whether the trace still leads to a node, or to the beginning.
  bool follows(const Trace& trace) const;
  void roll_back(Trace& trace, int32_t length) const;
  // Where a sequence stands that begins with a match.
  void start(Trace& trace, std::span<const int64_t> prompt, std::span<const int32_t> nodes,
             int32_t length) const;

  // Of a block that someone refers to.
  void set_priority(int32_t block, int32_t priority) { marks_.set_priority(block, priority); }
  void grow(int64_t num_blocks);
  void collide_hashes() { tree_.collide_hashes(); }

  std::span<const int32_t> blocks(int32_t node) const { return tree_.blocks(node); }
  int32_t window(int32_t group) const { return windows_[group]; }
  const std::vector<int32_t>& windows() const { return windows_; }
  uint32_t epoch() const { return epoch_; }
  size_t bytes() const { return tree_.bytes() + marks_.bytes(); }

  struct Counters {
    int64_t asked = 0, found = 0;       // tokens
    int64_t evictions = 0, merged = 0;  // blocks
  } counters;

 private:
  friend class PrefixInspector;  // prefix_integrity.cpp

  int32_t longest_valid(std::span<const int32_t> nodes, int32_t length) const;
  int32_t find_full(std::span<const int64_t> prompt, int64_t salt,
                    std::vector<int32_t>& nodes) const;
  PrefixTree::Parent parent_of(const Trace& trace) const;
  bool can_add(PrefixTree::Parent parent, std::span<const int32_t> entries,
               std::span<const int64_t> tokens) const;
  int32_t add_node(PrefixTree::Parent parent, uint64_t hash, std::span<const int64_t> tokens,
                   std::span<const int32_t> entries, int32_t priority, BlockPool& pool);
  void adopt(int32_t node, int32_t group, int32_t block, int32_t priority, BlockPool& pool);
  void evict(int32_t block, BlockPool& pool);
  void remove(int32_t node, BlockPool& pool);
  void remove_barren(int32_t node);
  bool make_node_room(BlockPool& pool);
  static int64_t max_nodes(int64_t num_blocks, const std::vector<int32_t>& windows);

  BlockSize block_size_;
  std::vector<int32_t> windows_;  // [group]
  bool has_windows_, has_full_;
  PrefixTree tree_;
  BlockMarks marks_;
  uint32_t epoch_ = 1;
  std::vector<int32_t> pending_;  // scratch
};

}  // namespace pykvcache
