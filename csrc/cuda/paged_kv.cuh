// From a position of a sequence to an address in the block pool: the one place that reads a block
// table, and the one place where (block, head, slot) becomes an offset.
#pragma once

#include "cuda/kernel_params.h"
#include "cuda/ptx.cuh"

namespace pykvcache::cuda {

// Offset in elements. The block id is widened before it is multiplied: a pool may hold more than
// 2^31 elements.
__device__ __forceinline__ int64_t cache_offset(const CacheView& cache, int64_t block, int64_t head,
                                                int64_t slot) {
  return block * cache.stride_block + head * cache.stride_head + slot * cache.stride_slot;
}

struct BlockSlot {
  int32_t block;  // -1: a hole, or past the end
  int32_t slot;
};

// One sequence of the batch.
struct Sequence {
  const int32_t* table;  // [max_blocks]
  int32_t row;           // of the batch
  int32_t kv_len;
  int32_t q_begin;  // first of its tokens in q
  int32_t q_len;

  // Entries of blocks that begin at or past kv_len are never read.
  __device__ __forceinline__ BlockSlot locate(const Divisor& block_size, int32_t position) const {
    if (position >= kv_len) return {-1, 0};
    const int32_t index = block_size.quotient(position);
    const int32_t block = table[index];
    return {block < 0 ? -1 : block, position - index * static_cast<int32_t>(block_size.divisor)};
  }
};

__device__ __forceinline__ Sequence load_sequence(const AttentionParams& p, int32_t row) {
  Sequence s;
  s.row = row;
  s.table = p.block_table + row * p.block_table_stride;
  s.kv_len = p.seq_lens[row];
  s.q_begin = p.cu_seqlens_q[row];
  s.q_len = p.cu_seqlens_q[row + 1] - s.q_begin;
  return s;
}

// The row b with starts[b] <= index < starts[b + 1], or `rows` if there is none; `starts` does not
// fall. Each thread for itself.
__device__ __forceinline__ int32_t find_row(const int32_t* starts, int32_t rows, int64_t index) {
  int32_t low = 0, high = rows;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (starts[middle + 1] <= index)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The same by a warp together: its loads do not wait for one another.
__device__ __forceinline__ int32_t find_row_together(const int32_t* starts, int32_t rows,
                                                     int64_t index, int lane) {
  int32_t before = 0;
  for (int32_t first = 0; first < rows; first += 32) {
    const int32_t row = first + lane;
    before += __popc(__ballot_sync(0xffffffffu, row < rows && starts[row + 1] <= index));
  }
  return before;
}

// The part of a scale that is one number a head; 1 if there is none.
__device__ __forceinline__ float head_scale(const ScaleView& scale, int64_t head) {
  if (scale.kind == ScaleKind::kScalar) return scale.data[0];
  if (scale.kind == ScaleKind::kHead) return scale.data[head * scale.stride_head];
  return 1.0f;
}

// Where the scales of a block lie: one a slot, or one a channel.
__device__ __forceinline__ float* block_scales(const ScaleView& scale, int64_t block,
                                               int64_t head) {
  return scale.data + block * scale.stride_block + head * scale.stride_head;
}

}  // namespace pykvcache::cuda
