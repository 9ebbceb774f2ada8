// The treap of siblings in PrefixTree. Keys are the salt, for nodes without parent, and then the
// tokens; a node whose tokens are the beginning of another's comes first. Two are only equal if the
// older lacks blocks; the younger comes after it. Heap order is by a mix of the serial, which
// differs for all nodes.
#include <algorithm>

#include "allocator/prefix_tree.h"

namespace pykvcache {

uint64_t PrefixTree::treap_priority(const Node& node) {
  uint64_t x = node.serial * 0x9e3779b97f4a7c15ull;  // both steps can be undone: no two are equal
  return x ^ (x >> 32);
}

// Below 0 if the node comes before the key, above if after, 0 if equal; and the tokens in common.
int32_t PrefixTree::compare(const Node& node, const int64_t* its_tokens, uint64_t parent_serial,
                            const int64_t* tokens, int32_t count, int32_t* common) const {
  *common = 0;
  if (node.parent_serial != parent_serial) return node.parent_serial < parent_serial ? -1 : 1;
  const int32_t shorter = std::min(node.count, count);
  const int64_t* differs = std::mismatch(its_tokens, its_tokens + shorter, tokens).first;
  *common = static_cast<int32_t>(differs - its_tokens);
  if (*common == shorter) return (node.count > count) - (node.count < count);
  return *differs < tokens[*common] ? -1 : 1;
}

bool PrefixTree::before(int32_t a, int32_t b) const {
  const Node& other = nodes_[b];
  int32_t common;
  const int32_t order =
      compare(nodes_[a], tokens(a), other.parent_serial, tokens(b), other.count, &common);
  return order == 0 ? nodes_[a].serial < other.serial : order < 0;
}

bool PrefixTree::complete(int32_t node) const {
  return std::ranges::find(blocks(node), kNone) == blocks(node).end();
}

// The child that shares most tokens is the last one before the key or the first after it, and both
// lie on the way down to the key.
PrefixTree::Overlap PrefixTree::best_child(Parent parent, const int64_t* rest,
                                           int32_t count) const {
  Overlap best;
  int32_t at = parent.node == kNone ? first_blocks_ : nodes_[parent.node].children;
  while (at != kNone && best.tokens < count) {
    const Node& node = nodes_[at];
    int32_t common;
    const int32_t order = compare(node, tokens(at), parent.serial, rest, count, &common);
    if (common > best.tokens && complete(at)) best = {at, common};
    at = order <= 0 ? node.right : node.left;
  }
  return best;
}

void PrefixTree::insert_sibling(int32_t node) {
  const uint64_t priority = treap_priority(nodes_[node]);
  int32_t* at = &sibling_root(nodes_[node]);
  while (*at != kNone && treap_priority(nodes_[*at]) > priority) {
    at = before(*at, node) ? &nodes_[*at].right : &nodes_[*at].left;
  }
  int32_t below = *at;
  int32_t *left = &nodes_[node].left, *right = &nodes_[node].right;
  while (below != kNone) {  // split what was here into what comes before the node and after it
    if (before(below, node)) {
      *left = below;
      left = &nodes_[below].right;
      below = *left;
    } else {
      *right = below;
      right = &nodes_[below].left;
      below = *right;
    }
  }
  *left = *right = kNone;
  *at = node;
}

void PrefixTree::detach(int32_t node) {
  int32_t* at = &sibling_root(nodes_[node]);
  while (*at != node) at = before(*at, node) ? &nodes_[*at].right : &nodes_[*at].left;
  int32_t left = nodes_[node].left, right = nodes_[node].right;
  while (left != kNone && right != kNone) {
    if (treap_priority(nodes_[left]) > treap_priority(nodes_[right])) {
      *at = left;
      at = &nodes_[left].right;
      left = *at;
    } else {
      *at = right;
      at = &nodes_[right].left;
      right = *at;
    }
  }
  *at = left != kNone ? left : right;
}

}  // namespace pykvcache
