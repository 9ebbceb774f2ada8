// The tree of known prefixes: a node stands for the tokens of one block after those of its parent.
//
// Two ways lead to a child. A hash of the whole prefix finds a full block; it only proposes: the
// parent, by a serial number that is never used again, and every token are compared. The children
// of a node also form a treap (a search tree with random priorities, Seidel and Aragon 1996) in the
// order of their tokens, in which the child that shares most tokens with a given rest is a
// neighbour of it. A node with fewer tokens than a block holds is the end of a sequence: it has no
// children and is found by the treap alone. Nodes lie in flat arrays and are reused.
//
// Files: prefix_tree.cpp, siblings.cpp (the treap). Read next: prefix_cache.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pykvcache {

class PrefixTree {
 public:
  static constexpr int32_t kNone = -1;

  struct alignas(64) Node {
    uint64_t serial = 0;  // 0: not in use
    uint64_t parent_serial;
    uint64_t hash;
    int32_t parent;
    int32_t next;         // in the bucket, or the next unused node
    int32_t left, right;  // siblings before and after it in the treap
    int32_t children;     // root of their treap
    int32_t count;        // tokens
  };

  // Under which node to look. The first block of a prompt has no parent; its salt stands for the
  // serial, so that prompts with different salts have nothing in common.
  struct Parent {
    int32_t node;
    uint64_t serial;
  };
  static Parent root(int64_t salt) { return {kNone, static_cast<uint64_t>(salt)}; }
  Parent below(int32_t node) const { return {node, nodes_[node].serial}; }

  PrefixTree(int32_t block_size, int32_t groups, int64_t max_nodes, uint64_t seed);

  // Hash of a prefix from that of the prefix one block shorter.
  uint64_t start_hash(int64_t salt) const;
  uint64_t extend_hash(uint64_t hash, const int64_t* tokens) const;

  // The child with exactly these block_size tokens, or kNone.
  int32_t find(Parent parent, uint64_t hash, const int64_t* tokens) const;

  struct Overlap {
    int32_t node = kNone;
    int32_t tokens = 0;  // in common
  };
  // The child that shares most leading tokens with the `count` given, of those whose blocks are all
  // present. Children without them may hide one with a shorter overlap.
  Overlap best_child(Parent parent, const int64_t* tokens, int32_t count) const;

  bool full() const { return num_nodes_ == max_nodes_; }
  // A new child without blocks. Requires that there is none with these tokens, and !full().
  int32_t insert(Parent parent, uint64_t hash, const int64_t* tokens, int32_t count);
  // Takes a node from among its siblings; what hangs below it is found no more.
  void detach(int32_t node);
  // Makes a node unused that was detached, or whose ancestor was.
  void release(int32_t node);
  void clear();
  void grow(int64_t max_nodes);

  const Node& node(int32_t node) const { return nodes_[node]; }
  const int64_t* tokens(int32_t node) const { return &tokens_[size_t(node) * block_size_]; }
  std::span<int32_t> blocks(int32_t node) { return {&blocks_[size_t(node) * groups_], groups_}; }
  std::span<const int32_t> blocks(int32_t node) const {
    return {&blocks_[size_t(node) * groups_], groups_};
  }
  int64_t num_nodes() const { return num_nodes_; }
  int64_t num_slots() const { return static_cast<int64_t>(nodes_.size()); }
  int32_t block_size() const { return block_size_; }
  size_t bytes() const;

  // For lookups of many blocks: memory that find() will read.
  void prefetch_bucket(uint64_t hash) const { __builtin_prefetch(&buckets_[hash & mask_]); }
  void prefetch_candidate(uint64_t hash) const;

  // Makes all hashes equal; only for tests, on an empty tree.
  void collide_hashes() { collide_ = true; }

 private:
  friend class PrefixInspector;  // prefix_integrity.cpp

  static uint64_t treap_priority(const Node& node);
  int32_t compare(const Node& node, const int64_t* its_tokens, uint64_t parent_serial,
                  const int64_t* tokens, int32_t count, int32_t* common) const;
  bool before(int32_t a, int32_t b) const;
  int32_t& sibling_root(const Node& node) {
    return node.parent == kNone ? first_blocks_ : nodes_[node.parent].children;
  }
  void insert_sibling(int32_t node);
  bool complete(int32_t node) const;
  void set_buckets();

  int32_t block_size_;
  size_t groups_;
  int64_t max_nodes_;
  uint64_t seed_;
  bool collide_ = false;
  uint64_t next_serial_ = 1;
  int64_t num_nodes_ = 0;
  int32_t unused_ = kNone;        // list of nodes
  int32_t first_blocks_ = kNone;  // treap of the nodes without parent
  std::vector<Node> nodes_;
  std::vector<int64_t> tokens_;  // [node][block_size]
  std::vector<int32_t> blocks_;  // [node][group], kNone where the block is gone
  std::vector<int32_t> buckets_;
  uint64_t mask_ = 0;
};

}  // namespace pykvcache
