#include "allocator/prefix_cache.h"

#include <algorithm>
#include <array>
#include <limits>
#include <random>

namespace pykvcache {

namespace {

constexpr int64_t kAhead = 16;  // blocks of a prompt whose memory is fetched together

uint64_t random_seed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

}  // namespace

PrefixCache::PrefixCache(int64_t num_blocks, BlockSize block_size, std::vector<int32_t> windows)
    : block_size_(block_size),
      windows_(std::move(windows)),
      has_windows_(std::ranges::any_of(windows_, [](int32_t window) { return window > 0; })),
      has_full_(std::ranges::any_of(windows_, [](int32_t window) { return window == 0; })),
      tree_(block_size, static_cast<int32_t>(windows_.size()), max_nodes(num_blocks, windows_),
            random_seed()),
      marks_(num_blocks) {}

// A node without a block is kept while it leads to others, which only happens if all groups have
// windows: a long sequence then leaves more nodes than blocks.
int64_t PrefixCache::max_nodes(int64_t num_blocks, const std::vector<int32_t>& windows) {
  const bool has_full = std::ranges::find(windows, 0) != windows.end();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return std::min(has_full ? num_blocks : 4 * num_blocks, kMost);
}

void PrefixCache::grow(int64_t num_blocks) {
  marks_.grow(num_blocks);
  tree_.grow(max_nodes(num_blocks, windows_));
}

void PrefixCache::share(int32_t block, BlockPool& pool) {
  if (pool.refs(block) == 0) marks_.unqueue(block);
  pool.share(block);
}

void PrefixCache::drop(int32_t block, BlockPool& pool) {
  if (pool.unshare(block)) give_back(block, pool);
}

void PrefixCache::give_back(int32_t block, BlockPool& pool) {
  if (marks_.node(block) == kNone) {
    pool.give_back(block);
  } else {
    marks_.queue(block);
  }
}

void PrefixCache::make_room(int64_t n, BlockPool& pool) {
  while (pool.num_free() < n) {
    const int32_t victim = marks_.victim(), next = marks_.newer(victim);
    if (next != kNone) marks_.prefetch(next);
    evict(victim, pool);
  }
}

// Takes the content of a cached block away.
void PrefixCache::evict(int32_t block, BlockPool& pool) {
  const int32_t node = marks_.node(block);
  const auto blocks = tree_.blocks(node);
  const auto group = std::ranges::find(blocks, block) - blocks.begin();
  if (windows_[group] == 0) {
    remove(node, pool);
    return;
  }
  blocks[group] = kNone;
  marks_.set_node(block, kNone);
  marks_.unqueue(block);
  pool.give_back(block);
  ++counters.evictions;
  remove_barren(node);
}

// Removes a node and what hangs below it. Blocks that someone refers to are no longer indexed.
void PrefixCache::remove(int32_t top, BlockPool& pool) {
  const int32_t parent = tree_.node(top).parent;
  tree_.detach(top);
  pending_.assign(1, top);
  while (!pending_.empty()) {
    const int32_t node = pending_.back();
    pending_.pop_back();
    const PrefixTree::Node& links = tree_.node(node);
    if (links.children != kNone) pending_.push_back(links.children);
    if (node != top && links.left != kNone) pending_.push_back(links.left);
    if (node != top && links.right != kNone) pending_.push_back(links.right);
    for (const int32_t block : tree_.blocks(node)) {
      if (block == kNone) continue;
      if (pool.refs(block) == 0) {
        marks_.unqueue(block);
        pool.give_back(block);
        ++counters.evictions;
      }
      marks_.set_node(block, kNone);
    }
    tree_.release(node);
  }
  remove_barren(parent);
}

// Without blocks a node only serves to lead to others. There is none in a tree with full groups.
void PrefixCache::remove_barren(int32_t node) {
  while (node != kNone && tree_.node(node).children == kNone &&
         std::ranges::all_of(tree_.blocks(node), [](int32_t block) { return block == kNone; })) {
    const int32_t parent = tree_.node(node).parent;
    tree_.detach(node);
    tree_.release(node);
    node = parent;
  }
}

void PrefixCache::forget_block(int32_t block, BlockPool& pool) {
  const int32_t node = marks_.node(block);
  if (node != kNone) remove(node, pool);
}

void PrefixCache::forget(BlockPool& pool) {
  for (int64_t node = 0; node < tree_.num_slots(); ++node) {
    if (tree_.node(static_cast<int32_t>(node)).serial == 0) continue;
    for (const int32_t block : tree_.blocks(static_cast<int32_t>(node))) {
      if (block == kNone) continue;
      if (pool.refs(block) == 0) {
        marks_.unqueue(block);
        pool.give_back(block);
      }
      marks_.set_node(block, kNone);
    }
  }
  tree_.clear();
  ++epoch_;
}

// Full blocks of the prompt, as far as they are known. The hashes of some blocks are computed
// together, so that their memory is on its way before the first is compared.
int32_t PrefixCache::find_full(std::span<const int64_t> prompt, int64_t salt,
                               std::vector<int32_t>& nodes) const {
  const int64_t block_size = block_size_;
  const int64_t full = static_cast<int64_t>(prompt.size()) / block_size;
  PrefixTree::Parent parent = PrefixTree::root(salt);
  uint64_t hash = tree_.start_hash(salt);
  std::array<uint64_t, kAhead> hashes;
  for (int64_t begin = 0; begin < full; begin += kAhead) {
    const int64_t end = std::min(begin + kAhead, full);
    for (int64_t i = begin; i < end; ++i) {
      hash = hashes[i - begin] = tree_.extend_hash(hash, &prompt[i * block_size]);
      tree_.prefetch_bucket(hash);
    }
    for (int64_t i = begin; i < end; ++i) tree_.prefetch_candidate(hashes[i - begin]);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t node = tree_.find(parent, hashes[i - begin], &prompt[i * block_size]);
      if (node == kNone) return static_cast<int32_t>(i);
      for (const int32_t block : tree_.blocks(node)) {
        if (block != kNone) marks_.prefetch(block);
      }
      nodes.push_back(node);
      parent = tree_.below(node);
    }
  }
  return static_cast<int32_t>(full);
}

int32_t PrefixCache::match(std::span<const int64_t> prompt, int64_t salt,
                           std::vector<int32_t>& nodes) const {
  nodes.clear();
  int32_t length = find_full(prompt, salt, nodes) * block_size_;
  const auto rest = prompt.subspan(length);
  const PrefixTree::Parent parent =
      nodes.empty() ? PrefixTree::root(salt) : tree_.below(nodes.back());
  const int32_t most = std::min<int64_t>(rest.size(), block_size_);
  const PrefixTree::Overlap last = tree_.best_child(parent, rest.data(), most);
  if (last.node != kNone) {
    nodes.push_back(last.node);
    length += last.tokens;
  }
  if (has_windows_) length = longest_valid(nodes, length);
  nodes.resize(block_size_.count(length));
  return length;
}

// The longest part of a match whose next token finds all blocks that it reads. Within a block the
// longest part needs the fewest, so only the ends of blocks are tried.
int32_t PrefixCache::longest_valid(std::span<const int32_t> nodes, int32_t length) const {
  std::vector<int32_t> missing(windows_.size(), -1);  // index of the last missing block
  int32_t best = 0;
  for (int32_t i = 0; i < static_cast<int32_t>(nodes.size()); ++i) {
    const int32_t end = std::min<int64_t>((i + int64_t{1}) * block_size_, length);
    const auto blocks = tree_.blocks(nodes[i]);
    bool valid = true;
    for (size_t group = 0; group < windows_.size(); ++group) {
      if (windows_[group] == 0) continue;
      if (blocks[group] == kNone) missing[group] = i;
      valid &= missing[group] < block_size_.index(std::max(0, end - windows_[group]));
    }
    if (valid) best = end;
  }
  return best;
}

}  // namespace pykvcache
