// The recount of the prefix index: nodes, the blocks that they claim, the order of eviction and the
// traces of sequences.
#include <algorithm>

#include "allocator/inspector.h"

namespace pykvcache {

// Reads the private parts of one prefix index.
class PrefixInspector {
 public:
  PrefixInspector(const PrefixCache& prefixes, const BlockPool& pool)
      : prefixes_(prefixes), tree_(prefixes.tree_), marks_(prefixes.marks_), pool_(pool) {}

  void check() const {
    check_nodes();
    check_buckets();
    check_reachable();
    check_blocks();
    check_queues();
  }
  void check_trace(const Trace& trace, const Sequence& sequence, const Table& table,
                   int32_t group) const;

 private:
  static constexpr int32_t kNone = PrefixTree::kNone;
  bool alive(int32_t node) const {
    return node >= 0 && node < tree_.num_slots() && tree_.node(node).serial != 0;
  }
  void check_nodes() const;
  void check_buckets() const;
  void check_reachable() const;
  void check_siblings(int32_t root, int32_t parent, std::vector<int32_t>& pending) const;
  void check_blocks() const;
  void check_queues() const;

  const PrefixCache& prefixes_;
  const PrefixTree& tree_;
  const BlockMarks& marks_;
  const BlockPool& pool_;
};

void PrefixInspector::check_nodes() const {
  int64_t alive_nodes = 0;
  for (int32_t i = 0; i < tree_.num_slots(); ++i) {
    const PrefixTree::Node& node = tree_.node(i);
    if (node.serial == 0) continue;
    ++alive_nodes;
    require(node.serial < tree_.next_serial_, "node ", i, " has serial ", node.serial);
    require(node.count > 0 && node.count <= tree_.block_size(), "node ", i, " has ", node.count,
            " tokens");
    require(node.count == tree_.block_size() || node.children == kNone, "node ", i,
            " is not full, but has children");
    if (node.parent != kNone) {
      require(alive(node.parent) && tree_.node(node.parent).serial == node.parent_serial, "node ",
              i, " has lost its parent ", node.parent);
    }
    if (node.count < tree_.block_size()) continue;
    const uint64_t start = node.parent == kNone
                               ? tree_.start_hash(static_cast<int64_t>(node.parent_serial))
                               : tree_.node(node.parent).hash;
    require(node.hash == tree_.extend_hash(start, tree_.tokens(i)), "node ", i,
            " has a hash of other tokens");
  }
  require(alive_nodes == tree_.num_nodes(), alive_nodes, " nodes instead of ", tree_.num_nodes());
  require(alive_nodes <= tree_.max_nodes_, alive_nodes, " nodes of at most ", tree_.max_nodes_);
}

void PrefixInspector::check_buckets() const {
  int64_t found = 0, full = 0;
  for (size_t bucket = 0; bucket < tree_.buckets_.size(); ++bucket) {
    for (int32_t at = tree_.buckets_[bucket]; at != kNone; at = tree_.node(at).next) {
      require(alive(at) && (tree_.node(at).hash & tree_.mask_) == bucket, "node ", at,
              " is in bucket ", bucket);
      require(++found <= tree_.num_nodes(), "bucket ", bucket, " is a circle");
    }
  }
  for (int32_t i = 0; i < tree_.num_slots(); ++i) {
    full += alive(i) && tree_.node(i).count == tree_.block_size();
  }
  require(found == full, found, " nodes in buckets instead of ", full);
}

// Order, heap and parent of one treap; appends its nodes to `pending`.
void PrefixInspector::check_siblings(int32_t root, int32_t parent,
                                     std::vector<int32_t>& pending) const {
  std::vector<int32_t> path, in_order;
  for (int32_t at = root; at != kNone || !path.empty();) {
    if (at != kNone) {
      require(alive(at) && tree_.node(at).parent == parent, "node ", at,
              " is among the children of ", parent);
      for (const int32_t child : {tree_.node(at).left, tree_.node(at).right}) {
        require(child == kNone || (alive(child) && PrefixTree::treap_priority(tree_.node(child)) <
                                                       PrefixTree::treap_priority(tree_.node(at))),
                "node ", child, " is below ", at, " in their treap");
      }
      path.push_back(at);
      require(static_cast<int64_t>(path.size()) <= tree_.num_nodes(), "a treap is a circle");
      at = tree_.node(at).left;
      continue;
    }
    in_order.push_back(path.back());
    at = tree_.node(path.back()).right;
    path.pop_back();
  }
  for (size_t i = 1; i < in_order.size(); ++i) {
    require(tree_.before(in_order[i - 1], in_order[i]), "node ", in_order[i],
            " is out of order in its treap");
  }
  pending.insert(pending.end(), in_order.begin(), in_order.end());
}

void PrefixInspector::check_reachable() const {
  std::vector<int32_t> pending;
  int64_t reached = 0;
  check_siblings(tree_.first_blocks_, kNone, pending);
  while (!pending.empty()) {
    const int32_t node = pending.back();
    pending.pop_back();
    require(++reached <= tree_.num_nodes(), "node ", node, " is reached twice");
    check_siblings(tree_.node(node).children, node, pending);
  }
  require(reached == tree_.num_nodes(), reached, " nodes are reachable of ", tree_.num_nodes());
}

void PrefixInspector::check_blocks() const {
  std::vector<int32_t> node_of(pool_.num_blocks(), kNone);
  for (int32_t i = 0; i < tree_.num_slots(); ++i) {
    if (!alive(i)) continue;
    const auto blocks = tree_.blocks(i);
    bool any = false;
    for (size_t group = 0; group < blocks.size(); ++group) {
      require(blocks[group] != kNone || prefixes_.windows_[group] > 0, "node ", i,
              " has no block of group ", group, ", which has no window");
      if (blocks[group] == kNone) continue;
      any = true;
      require(blocks[group] >= 0 && blocks[group] < pool_.num_blocks(), "node ", i, " has block ",
              blocks[group]);
      require(node_of[blocks[group]] == kNone, "block ", blocks[group], " is in two nodes");
      node_of[blocks[group]] = i;
    }
    require(any || tree_.node(i).children != kNone, "node ", i, " is of no use");
  }
  for (int64_t block = 0; block < pool_.num_blocks(); ++block) {
    require(marks_.node(block) == node_of[block], "block ", block, " claims node ",
            marks_.node(block), " and is of node ", node_of[block]);
  }
}

void PrefixInspector::check_queues() const {
  int64_t queued = 0;
  for (int32_t level = 0; level < BlockMarks::kLevels; ++level) {
    const BlockMarks::List& list = marks_.lists_[level];
    const bool used = (marks_.used_[level / 64] >> (level % 64)) & 1;
    require(used == (list.oldest != kNone), "eviction list ", level, " is marked wrongly");
    int32_t older = kNone;
    for (int32_t block = list.oldest; block != kNone; block = marks_.marks_[block].newer) {
      require(++queued <= pool_.num_blocks(), "eviction list ", level, " is a circle");
      require(prefixes_.is_cached(block, pool_), "block ", block, " is to be evicted, but in use");
      require(marks_.priority(block) - BlockMarks::kLowest == level, "block ", block,
              " is in the eviction list of another priority");
      require(marks_.marks_[block].older == older, "block ", block, " is linked wrongly");
      older = block;
    }
    require(list.newest == older, "eviction list ", level, " ends wrongly");
  }
  int64_t cached = 0;
  for (int64_t block = 0; block < pool_.num_blocks(); ++block) {
    cached += prefixes_.is_cached(block, pool_);
  }
  require(queued == cached && queued == marks_.num_queued(), queued, " blocks can be evicted, ",
          cached, " are cached");
}

void PrefixInspector::check_trace(const Trace& trace, const Sequence& sequence, const Table& table,
                                  int32_t group) const {
  require(trace.recorded >= 0 && trace.recorded <= sequence.length, "sequence ", sequence.handle,
          " has ", sequence.length, " tokens, but recorded ", trace.recorded);
  if (!prefixes_.follows(trace)) return;
  int32_t full = prefixes_.block_size_.index(trace.recorded);
  const int64_t tokens =
      int64_t{full} * prefixes_.block_size_ + static_cast<int64_t>(trace.tail.size());
  require(tokens == trace.recorded, "sequence ", sequence.handle, " recorded ", trace.recorded,
          " tokens, but ", tokens, " are known");
  for (int32_t node = trace.tip; full-- > 0; node = tree_.node(node).parent) {
    require(alive(node), "sequence ", sequence.handle, " follows fewer than ", full, " blocks");
    const int32_t own = table.blocks[full];
    require(own == kNone || own == tree_.blocks(node)[group] || tree_.blocks(node)[group] == kNone,
            "sequence ", sequence.handle, " has block ", own, " where the index has ",
            tree_.blocks(node)[group]);
    if (full == 0) {
      require(tree_.node(node).parent == kNone &&
                  static_cast<int64_t>(tree_.node(node).parent_serial) == trace.salt,
              "sequence ", sequence.handle, " follows a prefix of another salt");
    }
  }
}

void Inspector::check_prefixes() const {
  const PrefixInspector inspector(*allocator_.prefixes_, pool_);
  inspector.check();
  require(allocator_.traces_.size() >= store_.num_slots(), "there are only ",
          allocator_.traces_.size(), " traces of ", store_.num_slots(), " sequences");
  for (uint32_t slot = 0; slot < store_.num_slots(); ++slot) {
    const Sequence& sequence = store_.sequence(slot);
    if (sequence.handle == 0) continue;
    for (int32_t group = 0; group < store_.groups(); ++group) {
      inspector.check_trace(allocator_.traces_[slot], sequence, store_.table(slot, group), group);
    }
  }
}

}  // namespace pykvcache
