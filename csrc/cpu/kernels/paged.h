// The one place where (block, head, slot) becomes an address, and where a block table is read.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace pykvcache::KV_ISA {

// Offset in elements of a slot for head 0; the id is widened before the first multiplication.
KV_INLINE int64_t slot_offset(const CacheView& cache, int32_t block, int64_t slot) {
  return static_cast<int64_t>(block) * cache.stride_block + slot * cache.stride_slot;
}

template <class T>
KV_INLINE const T* head_base(const CacheView& cache, int64_t head) {
  return static_cast<const T*>(cache.data) + head * cache.stride_head;
}

// Walks the tokens of one batch row that are really stored: positions in [begin, end) whose block
// is not a hole. Entries of the table at or past `end` are never read.
class TokenCursor {
 public:
  TokenCursor(const AttentionParams& p, int64_t row, int64_t begin, int64_t end)
      : p_(p), table_(p.block_table + row * p.block_table_stride), position_(begin), end_(end) {}

  // Up to `capacity` tokens: their positions and their offsets in the two caches; how many.
  int64_t take(int64_t capacity, int32_t* positions, int64_t* k_offsets, int64_t* v_offsets) {
    int64_t count = 0;
    while (count < capacity && position_ < end_) {
      const int64_t slot = position_ % p_.block_size;
      const int32_t block = table_[position_ / p_.block_size];
      const int64_t in_block = min_of(p_.block_size - slot, end_ - position_);
      if (block < 0) {
        position_ += in_block;
        continue;
      }
      const int64_t n = min_of(in_block, capacity - count);
      const int64_t k_first = slot_offset(p_.k, block, slot);
      const int64_t v_first = slot_offset(p_.v, block, slot);
      for (int64_t i = 0; i < n; ++i) {
        positions[count + i] = static_cast<int32_t>(position_ + i);
        k_offsets[count + i] = k_first + i * p_.k.stride_slot;
        v_offsets[count + i] = v_first + i * p_.v.stride_slot;
      }
      count += n;
      position_ += n;
    }
    return count;
  }

 private:
  const AttentionParams& p_;
  const int32_t* table_;
  int64_t position_;
  int64_t end_;
};

}  // namespace pykvcache::KV_ISA
