// The cache operators: writing tokens, copying blocks, gathering blocks to dense rows, slots of new
// tokens. Rows are moved in vectors as wide as addresses and sizes allow (Vector: 16, 4 or 1
// bytes).
#pragma once

#include "cuda/paged_kv.cuh"

namespace pykvcache::cuda {

constexpr int kCopyThreads = 256;
constexpr float kFloat8Max = 448.0f;
constexpr float kSmallestScale = 1e-12f;

struct SlotPlace {
  int64_t block;  // -1: skip
  int64_t slot;
};

__device__ __forceinline__ SlotPlace slot_place(const WriteArguments& p, int64_t token) {
  const int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_slots) return {-1, 0};
  const int64_t block = slot / p.block_size;
  return {block, slot - block * p.block_size};
}

// Same dtype, no scale. grid (T, sides); a thread moves vectors of the token's heads.
template <class Vector>
__device__ __forceinline__ void write_rows(const WriteArguments& p) {
  const int64_t token = blockIdx.x;
  const TokenView& x = p.tokens[blockIdx.y];
  const CacheView& cache = p.caches[blockIdx.y];
  const SlotPlace place = slot_place(p, token);
  if (place.block < 0) return;
  const int64_t bytes = bytes_of(cache.dtype);
  const int per_row = static_cast<int>(cache.head_dim * bytes / sizeof(Vector));
  for (int i = threadIdx.x; i < per_row * p.num_heads; i += blockDim.x) {
    const int head = i / per_row, part = i - head * per_row;
    const auto* from =
        static_cast<const char*>(x.data) + (token * x.stride_token + head * x.stride_head) * bytes;
    auto* to =
        static_cast<char*>(cache.data) + cache_offset(cache, place.block, head, place.slot) * bytes;
    reinterpret_cast<Vector*>(to)[part] = reinterpret_cast<const Vector*>(from)[part];
  }
}

__device__ __forceinline__ float warp_max(float x) {
  for (int flip = 16; flip > 0; flip /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, flip));
  return x;
}

// With a scale, to Float8 or T. grid (T, HKV, sides), one warp a row.
template <class T>
__device__ __forceinline__ void write_scaled(const WriteArguments& p) {
  const int side = blockIdx.z, lane = threadIdx.x;
  const int64_t token = blockIdx.x, head = blockIdx.y;
  const SlotPlace place = slot_place(p, token);
  if (place.block < 0) return;
  const TokenView& x = p.tokens[side];
  const CacheView& cache = p.caches[side];
  const ScaleView& scale = p.scales[side];
  const T* from = static_cast<const T*>(x.data) + token * x.stride_token + head * x.stride_head;
  float factor = head_scale(scale, head);
  if (scale.kind == ScaleKind::kSlot) {
    float largest = 0.0f;
    for (int64_t d = lane; d < cache.head_dim; d += 32)
      largest = fmaxf(largest, fabsf(to_float(from[d])));
    factor = fmaxf(warp_max(largest) / kFloat8Max, kSmallestScale);
    if (lane == 0) block_scales(scale, place.block, head)[place.slot] = factor;
  }
  const int64_t to = cache_offset(cache, place.block, head, place.slot);
  for (int64_t d = lane; d < cache.head_dim; d += 32) {
    const float own =
        scale.kind == ScaleKind::kChannel ? block_scales(scale, place.block, head)[d] : factor;
    const float value = to_float(from[d]) / own;
    if (cache.dtype == DType::kFloat8E4M3)
      static_cast<Float8*>(cache.data)[to + d] = from_float<Float8>(value);
    else
      static_cast<T*>(cache.data)[to + d] = from_float<T>(value);
  }
}

// Before write_scaled, where scales are one a channel: the token that covers a block's first slot
// sets the block's scales, from all tokens of the call in that block. grid (T, HKV, sides).
template <class T>
__device__ __forceinline__ void fill_channel_scales(const WriteArguments& p) {
  const int side = blockIdx.z, lane = threadIdx.x;
  const ScaleView& scale = p.scales[side];
  const SlotPlace place = slot_place(p, blockIdx.x);
  if (scale.kind != ScaleKind::kChannel || place.block < 0 || place.slot != 0) return;
  const TokenView& x = p.tokens[side];
  const int64_t head = blockIdx.y;
  float* to = block_scales(scale, place.block, head);
  for (int64_t d = lane; d < p.caches[side].head_dim; d += 32) {
    float largest = 0.0f;
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      if (slot_place(p, token).block != place.block) continue;
      const T value =
          static_cast<const T*>(x.data)[token * x.stride_token + head * x.stride_head + d];
      largest = fmaxf(largest, fabsf(to_float(value)));
    }
    to[d] = fmaxf(largest / kFloat8Max, kSmallestScale);
  }
}

struct CopyParams {
  const char* from = nullptr;
  char* to = nullptr;
  const int64_t* pairs = nullptr;  // [N, 2]: source, destination
  int64_t from_stride = 0;         // bytes of a block to the next
  int64_t to_stride = 0;
  int64_t block_bytes = 0;  // contiguous
};

// grid (N, pieces of a block)
template <class Vector>
__device__ __forceinline__ void copy_blocks(const CopyParams& p) {
  const int64_t* pair = p.pairs + 2 * static_cast<int64_t>(blockIdx.x);
  const auto* from = reinterpret_cast<const Vector*>(p.from + pair[0] * p.from_stride);
  auto* to = reinterpret_cast<Vector*>(p.to + pair[1] * p.to_stride);
  const int64_t count = p.block_bytes / sizeof(Vector);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < count;
       i += step)
    to[i] = from[i];
}

struct GatherParams {
  CacheView caches[2];
  void* dense[2] = {};                    // [total_k, HKV, D | Dv]
  const int32_t* block_table = nullptr;   // [B, max_blocks]
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]
  int64_t block_table_stride = 0;
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t total = 0;
  Divisor block_size;
};

// Holes, and tokens after the last row, become zeros. grid (total_k, sides).
template <class Vector>
__device__ __forceinline__ void gather_rows(const GatherParams& p) {
  const int64_t token = blockIdx.x;
  const CacheView& cache = p.caches[blockIdx.y];
  const int32_t row = find_row(p.cu_seqlens_k, static_cast<int32_t>(p.batch), token);
  int64_t block = -1;
  int32_t slot = 0;
  if (row < p.batch) {
    const auto position = static_cast<int32_t>(token - p.cu_seqlens_k[row]);
    const int32_t column = p.block_size.quotient(position);
    block = p.block_table[row * p.block_table_stride + column];
    slot = p.block_size.remainder(position);
  }
  const int64_t bytes = bytes_of(cache.dtype);
  const int per_row = static_cast<int>(cache.head_dim * bytes / sizeof(Vector));
  auto* to = static_cast<Vector*>(p.dense[blockIdx.y]) + token * p.num_heads * per_row;
  for (int i = threadIdx.x; i < per_row * p.num_heads; i += blockDim.x) {
    const int head = i / per_row, part = i - head * per_row;
    const auto* from =
        static_cast<const char*>(cache.data) + cache_offset(cache, block, head, slot) * bytes;
    to[i] = block < 0 ? Vector{} : reinterpret_cast<const Vector*>(from)[part];
  }
}

struct SlotMappingParams {
  const int32_t* block_table = nullptr;   // [B, max_blocks]
  const int32_t* seq_lens = nullptr;      // [B]
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]
  int64_t* slots = nullptr;               // [num_tokens]
  int64_t block_table_stride = 0;
  int64_t max_blocks = 0;
  int64_t batch = 0;
  int64_t num_tokens = 0;
  Divisor block_size;
};

// One thread a token; -1 for padding, holes and tokens after the last row.
__device__ __forceinline__ void map_slots(const SlotMappingParams& p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= p.num_tokens) return;
  int64_t slot = -1;
  const int32_t row = find_row(p.cu_seqlens_q, static_cast<int32_t>(p.batch), token);
  if (row < p.batch) {
    const auto position = static_cast<int32_t>(p.seq_lens[row] - (p.cu_seqlens_q[row + 1] - token));
    const int32_t column = position < 0 ? 0 : p.block_size.quotient(position);
    if (position >= 0 && column < p.max_blocks) {
      const int64_t block = p.block_table[row * p.block_table_stride + column];
      if (block >= 0) slot = block * p.block_size.divisor + p.block_size.remainder(position);
    }
  }
  p.slots[token] = slot;
}

}  // namespace pykvcache::cuda
