// How sequences add what they hold to the prefix index.
#include <algorithm>

#include "allocator/prefix_cache.h"

namespace pykvcache {

bool PrefixCache::follows(const Trace& trace) const {
  return trace.epoch == epoch_ &&
         (trace.tip == kNone || tree_.node(trace.tip).serial == trace.tip_serial);
}

PrefixTree::Parent PrefixCache::parent_of(const Trace& trace) const {
  return trace.tip == kNone ? PrefixTree::root(trace.salt)
                            : PrefixTree::Parent{trace.tip, trace.tip_serial};
}

void PrefixCache::start(Trace& trace, std::span<const int64_t> prompt,
                        std::span<const int32_t> nodes, int32_t length) const {
  const int32_t full = block_size_.index(length);
  if (full > 0) {
    trace.tip = nodes[full - 1];
    trace.tip_serial = tree_.node(trace.tip).serial;
  }
  trace.recorded = length;
  trace.tail.assign(prompt.begin() + int64_t{full} * block_size_, prompt.begin() + length);
}

// Back to fewer tokens; those of the block that is then the last one are read from its node.
void PrefixCache::roll_back(Trace& trace, int32_t length) const {
  if (length == 0 && trace.epoch != Trace::kUnknown) {
    const int32_t priority = trace.priority;
    trace.begin(trace.salt, epoch_);
    trace.priority = priority;
    return;
  }
  if (length >= trace.recorded) return;
  if (!follows(trace)) {
    trace.lose();
    trace.recorded = length;
    return;
  }
  const int32_t full = block_size_.index(length);
  int32_t left = length - full * block_size_, last = kNone;
  for (int32_t i = block_size_.index(trace.recorded); i > full; --i) {
    last = trace.tip;
    trace.tip = tree_.node(last).parent;
  }
  if (last != kNone) {
    trace.tip_serial = trace.tip == kNone ? 0 : tree_.node(trace.tip).serial;
    trace.tail.assign(tree_.tokens(last), tree_.tokens(last) + left);
  }
  trace.tail.resize(left);
  trace.recorded = length;
}

// The index takes a sequence's block. One that ended a shorter sequence, and was filled up, is
// taken from the node of that end.
void PrefixCache::adopt(int32_t node, int32_t group, int32_t block, int32_t priority,
                        BlockPool& pool) {
  if (marks_.node(block) != kNone) remove(marks_.node(block), pool);
  tree_.blocks(node)[group] = block;
  marks_.set_node(block, node);
  marks_.set_priority(block, priority);
}

// Whether these blocks can become those of a node: in no other, except one for the end of a
// sequence that these tokens continue.
bool PrefixCache::can_add(PrefixTree::Parent parent, std::span<const int32_t> entries,
                          std::span<const int64_t> tokens) const {
  bool any = false;
  for (size_t group = 0; group < entries.size(); ++group) {
    if (entries[group] == kNone) {
      if (windows_[group] == 0) return false;
      continue;
    }
    any = true;
    const int32_t other = marks_.node(entries[group]);
    if (other == kNone) continue;
    const PrefixTree::Node& node = tree_.node(other);
    if (node.parent != parent.node || node.parent_serial != parent.serial ||
        node.count >= static_cast<int64_t>(tokens.size()) ||
        !std::equal(tokens.begin(), tokens.begin() + node.count, tree_.tokens(other))) {
      return false;
    }
  }
  return any;
}

bool PrefixCache::make_node_room(BlockPool& pool) {
  while (tree_.full() && num_cached() > 0) evict(marks_.victim(), pool);
  return !tree_.full();
}

int32_t PrefixCache::add_node(PrefixTree::Parent parent, uint64_t hash,
                              std::span<const int64_t> tokens, std::span<const int32_t> entries,
                              int32_t priority, BlockPool& pool) {
  const int32_t node =
      tree_.insert(parent, hash, tokens.data(), static_cast<int32_t>(tokens.size()));
  for (size_t group = 0; group < entries.size(); ++group) {
    if (entries[group] == kNone) continue;
    adopt(node, static_cast<int32_t>(group), entries[group], priority, pool);
  }
  return node;
}

uint64_t PrefixCache::hash_of(const Trace& trace) const {
  if (!follows(trace)) return 0;
  const uint64_t before =
      trace.tip == kNone ? tree_.start_hash(trace.salt) : tree_.node(trace.tip).hash;
  return tree_.extend_hash(before, trace.tail.data());
}

bool PrefixCache::add_block(Trace& trace, uint64_t hash, std::span<int32_t> entries,
                            BlockPool& pool) {
  if (!follows(trace)) {
    trace.lose();
    return false;
  }
  const PrefixTree::Parent parent = parent_of(trace);
  int32_t node = tree_.find(parent, hash, trace.tail.data());
  bool replaced = false;
  if (node == kNone) {
    if (!can_add(parent, entries, trace.tail) || !make_node_room(pool) || !follows(trace)) {
      trace.lose();
      return false;
    }
    node = add_node(parent, hash, trace.tail, entries, trace.priority, pool);
  } else {
    for (size_t group = 0; group < entries.size(); ++group) {
      const int32_t own = entries[group], known = tree_.blocks(node)[group];
      if (own == kNone || own == known) continue;
      if (known == kNone) {
        if (can_add(parent, {&entries[group], 1}, trace.tail)) {
          adopt(node, static_cast<int32_t>(group), own, trace.priority, pool);
        }
        continue;
      }
      share(known, pool);
      if (trace.priority > marks_.priority(known)) marks_.set_priority(known, trace.priority);
      entries[group] = known;
      drop(own, pool);
      ++counters.merged;
      replaced = true;
    }
  }
  trace.tip = node;
  trace.tip_serial = tree_.node(node).serial;
  trace.tail.clear();
  return replaced;
}

void PrefixCache::add_tail(Trace& trace, std::span<const int32_t> entries, BlockPool& pool) {
  if (trace.tail.empty() || !follows(trace)) return;
  const auto count = static_cast<int32_t>(trace.tail.size());
  const PrefixTree::Parent parent = parent_of(trace);
  if (tree_.best_child(parent, trace.tail.data(), count).tokens == count) return;
  if (!can_add(parent, entries, trace.tail) || !make_node_room(pool) || !follows(trace)) return;
  add_node(parent, 0, trace.tail, entries, trace.priority, pool);
}

}  // namespace pykvcache
