#include "allocator/prefix_tree.h"

#include <algorithm>
#include <bit>

namespace pykvcache {

namespace {

constexpr int64_t kMaxReserved = int64_t{1} << 27;  // tokens; memory is only touched when used

uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace

PrefixTree::PrefixTree(int32_t block_size, int32_t groups, int64_t max_nodes, uint64_t seed)
    : block_size_(block_size), groups_(groups), max_nodes_(max_nodes), seed_(seed) {
  if (max_nodes * block_size <= kMaxReserved) {  // so that it never has to move
    nodes_.reserve(max_nodes);
    tokens_.reserve(max_nodes * block_size);
    blocks_.reserve(max_nodes * groups);
  }
  set_buckets();
}

void PrefixTree::set_buckets() {
  const size_t buckets = std::bit_ceil(static_cast<size_t>(max_nodes_));
  mask_ = buckets - 1;
  buckets_.assign(buckets, kNone);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].serial == 0 || nodes_[i].count < block_size_) continue;
    int32_t& bucket = buckets_[nodes_[i].hash & mask_];
    nodes_[i].next = bucket;
    bucket = static_cast<int32_t>(i);
  }
}

uint64_t PrefixTree::start_hash(int64_t salt) const {
  return collide_ ? 0 : fold(static_cast<uint64_t>(salt) ^ seed_, 0xd6e8feb86659fd93ull);
}

// Products of tokens with odd keys of their position: they do not wait for each other, so this is
// as fast as the multiplier. The seed keeps strangers from choosing tokens that collide, which
// would not be wrong but slow.
uint64_t PrefixTree::extend_hash(uint64_t hash, const int64_t* tokens) const {
  if (collide_) return 0;
  uint64_t sum = 0, key = seed_;
  for (int32_t i = 0; i < block_size_; ++i) {
    key += 0x9e3779b97f4a7c16ull;  // even: no two keys differ in the lowest bit alone
    sum += fold(static_cast<uint64_t>(tokens[i]) ^ (key >> 7), key | 1);
  }
  return fold(hash ^ 0xa0761d6478bd642full, sum ^ seed_) + sum;
}

int32_t PrefixTree::find(Parent parent, uint64_t hash, const int64_t* wanted) const {
  for (int32_t at = buckets_[hash & mask_]; at != kNone; at = nodes_[at].next) {
    const Node& node = nodes_[at];
    if (node.hash == hash && node.parent == parent.node && node.parent_serial == parent.serial &&
        std::equal(wanted, wanted + block_size_, tokens(at))) {
      return at;
    }
  }
  return kNone;
}

void PrefixTree::prefetch_candidate(uint64_t hash) const {
  const int32_t at = buckets_[hash & mask_];
  if (at == kNone) return;
  constexpr int32_t kPerLine = 64 / sizeof(int64_t), kMost = 64;
  __builtin_prefetch(&nodes_[at]);
  __builtin_prefetch(&blocks_[at * groups_]);
  for (int32_t i = 0; i < std::min(block_size_, kMost); i += kPerLine) {
    __builtin_prefetch(tokens(at) + i);
  }
}

int32_t PrefixTree::insert(Parent parent, uint64_t hash, const int64_t* tokens, int32_t count) {
  int32_t at = unused_;
  if (at == kNone) {
    at = static_cast<int32_t>(nodes_.size());
    nodes_.emplace_back();
    tokens_.resize(tokens_.size() + block_size_);
    blocks_.resize(blocks_.size() + groups_);
  } else {
    unused_ = nodes_[at].next;
  }
  Node& node = nodes_[at];
  node = {next_serial_++, parent.serial, hash, parent.node, kNone, kNone, kNone, kNone, count};
  std::copy_n(tokens, count, &tokens_[size_t(at) * block_size_]);
  std::ranges::fill(blocks(at), kNone);
  if (count == block_size_) {
    int32_t& bucket = buckets_[hash & mask_];
    node.next = bucket;
    bucket = at;
  }
  insert_sibling(at);
  ++num_nodes_;
  return at;
}

void PrefixTree::release(int32_t node) {
  if (nodes_[node].count == block_size_) {
    int32_t* at = &buckets_[nodes_[node].hash & mask_];
    while (*at != node) at = &nodes_[*at].next;
    *at = nodes_[node].next;
  }
  nodes_[node].serial = 0;
  nodes_[node].next = unused_;
  unused_ = node;
  --num_nodes_;
}

void PrefixTree::clear() {
  nodes_.clear();
  tokens_.clear();
  blocks_.clear();
  std::ranges::fill(buckets_, kNone);
  num_nodes_ = 0;
  unused_ = first_blocks_ = kNone;
}

void PrefixTree::grow(int64_t max_nodes) {
  max_nodes_ = max_nodes;
  if (std::bit_ceil(static_cast<size_t>(max_nodes)) > buckets_.size()) set_buckets();
}

size_t PrefixTree::bytes() const {
  return nodes_.size() * sizeof(Node) + tokens_.size() * sizeof(int64_t) +
         (blocks_.size() + buckets_.size()) * sizeof(int32_t);
}

}  // namespace pykvcache
