// Positions to blocks. Dividing by a size that is known only at run time is done by a
// multiplication: floor((2^64 - 1) / size) * (n + 1) / 2^64 is exactly n / size for all n and sizes
// below 2^32.
#pragma once

#include <cstdint>
#include <limits>

namespace pykvcache {

class BlockSize {
 public:
  explicit BlockSize(int32_t size)
      : size_(size), reciprocal_(std::numeric_limits<uint64_t>::max() / size) {}

  operator int32_t() const { return size_; }

  // Index of the block that holds a position; also the number of blocks that end before it.
  int32_t index(int64_t position) const {
    using Wide = unsigned __int128;
    return static_cast<int32_t>((Wide{reciprocal_} * static_cast<uint64_t>(position + 1)) >> 64);
  }

  // Blocks that hold this many tokens.
  int32_t count(int64_t tokens) const { return index(tokens + size_ - 1); }

 private:
  int32_t size_;
  uint64_t reciprocal_;
};

}  // namespace pykvcache
