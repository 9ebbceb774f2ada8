// The pool of block ids: reference counts and the free list, as flat arrays.
//
// A block is in use while its count is above zero; each table entry is one reference and each pin
// is one. Freed ids go on a stack and are used before ids that were never handed out. Callers free
// a table back to front, so that the next allocation of the same size comes out in ascending order.
// take() and give_back() are where a life begins and ends. A block with content that may be wanted
// again is not given back when its count reaches zero (prefix_cache.h). Next: sequences.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace pykvcache {

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks) : refs_(num_blocks), free_(num_blocks) {}

  int64_t num_blocks() const { return static_cast<int64_t>(refs_.size()); }
  int64_t num_free() const { return num_freed_ + num_blocks() - fresh_; }
  int64_t num_used() const { return fresh_ - num_freed_; }
  // Most blocks that were in use at once; all ids handed out so far are below it.
  int64_t peak() const { return fresh_; }
  uint32_t refs(int32_t block) const { return refs_[block]; }

  // Writes n new block ids, each with one reference. Requires n <= num_free().
  void take(int64_t n, int32_t* blocks) {
    const int64_t reused = std::min(n, num_freed_);
    for (int64_t i = 0; i < reused; ++i) {
      const int32_t block = free_[--num_freed_];
      blocks[i] = block;
      refs_[block] = 1;
    }
    for (int64_t i = reused; i < n; ++i) {
      blocks[i] = static_cast<int32_t>(fresh_);
      refs_[fresh_++] = 1;
    }
  }

  void share(int32_t block) { ++refs_[block]; }

  // Takes one reference away; true when it was the last, and then give_back() is due.
  bool unshare(int32_t block) { return --refs_[block] == 0; }

  void give_back(int32_t block) { free_[num_freed_++] = block; }

  // Without a branch: whether a block dies is as good as random when prefixes are shared.
  void drop(int32_t block) {
    free_[num_freed_] = block;
    num_freed_ += unshare(block);
  }

  void grow(int64_t num_blocks) {
    refs_.resize(num_blocks);
    free_.resize(num_blocks);
  }

  void pin(int32_t block) {
    ++pins_[block];
    share(block);
  }
  // The caller drops the reference.
  void unpin(int32_t block) {
    if (--pins_[block] == 0) pins_.erase(block);
  }
  uint32_t pins(int32_t block) const {
    const auto found = pins_.find(block);
    return found == pins_.end() ? 0 : found->second;
  }

 private:
  friend class Inspector;  // stats.cpp, integrity.cpp
  friend class Archive;    // snapshot.cpp

  std::vector<uint32_t> refs_;
  std::vector<int32_t> free_;  // stack of num_freed_ ids
  int64_t num_freed_ = 0;
  int64_t fresh_ = 0;  // ids below it were handed out at least once
  std::unordered_map<int32_t, uint32_t> pins_;
};

}  // namespace pykvcache
