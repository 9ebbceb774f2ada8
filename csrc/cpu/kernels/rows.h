// Rows of K, V and q between memory and registers: from any storage dtype, dequantised if they have
// scales. Read next: pack.h.
#pragma once

#include "cpu/kernels/paged.h"
#include "cpu/kernels/vec.h"
#include "cpu/numeric.h"
#include "params.h"

namespace pykvcache::KV_ISA {

struct RowScale {
  float all = 1.0f;
  const float* channels = nullptr;  // [n], instead of `all`
};

template <class From, class To>
KV_INLINE void convert_row(const From* from, RowScale scale, int64_t n, To* to) {
  constexpr float kUnit = sizeof(From) == 1 ? kFloat8Unit : 1.0f;
  const float* channels = scale.channels;
  const Vec all = broadcast(scale.all * kUnit);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(to + i, load(from + i) * (channels ? load(channels + i) * broadcast(kUnit) : all));
  if (const int64_t left = n - i; left > 0) {
    const Vec factor = channels ? load_n(channels + i, left) * broadcast(kUnit) : all;
    store_n(to + i, load_n(from + i, left) * factor, left);
  }
}

template <class To>
KV_INLINE void convert_row(const void* from, DType dtype, RowScale scale, int64_t n, To* to) {
  switch (dtype) {
    case DType::kFloat32:
      return convert_row(static_cast<const float*>(from), scale, n, to);
    case DType::kFloat16:
      return convert_row(static_cast<const Float16*>(from), scale, n, to);
    case DType::kBFloat16:
      return convert_row(static_cast<const BFloat16*>(from), scale, n, to);
    default:
      return convert_row(static_cast<const Float8*>(from), scale, n, to);
  }
}

// K or V as one KV head of one batch row sees it.
struct Side {
  const CacheView& cache;
  const ScaleView& scale;
  const int32_t* blocks;  // [max_blocks]
  int64_t block_size;
  int64_t head;
  int64_t width;  // elements used of a cache row: D or Dv
};

// The part of a scale that is one number for the whole head. It is applied to scores or outputs, so
// that rows can be used as they are stored.
KV_INLINE float head_scale(const Side& side) {
  if (side.scale.kind == ScaleKind::kScalar) return *side.scale.data;
  if (side.scale.kind == ScaleKind::kHead)
    return side.scale.data[side.head * side.scale.stride_head];
  return 1.0f;
}

KV_INLINE bool has_row_scales(const Side& side) {
  return side.scale.kind == ScaleKind::kSlot || side.scale.kind == ScaleKind::kChannel;
}

KV_INLINE RowScale row_scale(const Side& side, int64_t position) {
  if (!has_row_scales(side)) return {};
  const int64_t block = side.blocks[position / side.block_size];
  const float* scales =
      side.scale.data + block * side.scale.stride_block + side.head * side.scale.stride_head;
  if (side.scale.kind == ScaleKind::kSlot) return {scales[position % side.block_size]};
  return {1.0f, scales};
}

KV_INLINE bool is_stored_as(DType dtype, const float*) { return dtype == DType::kFloat32; }
KV_INLINE bool is_stored_as(DType dtype, const BFloat16*) { return dtype == DType::kBFloat16; }

// Where the row that lies `offset` elements into the cache's first head begins.
KV_INLINE const char* row_address(const Side& side, int64_t offset) {
  const int64_t element = side.head * side.cache.stride_head + offset;
  return static_cast<const char*>(side.cache.data) + element * element_size(side.cache.dtype);
}

// The row at `position` and `offset`: in place if it is stored as To and has no scale of its own,
// else converted into `buffer`.
template <class To>
KV_INLINE const To* row_at(const Side& side, int64_t position, int64_t offset, To* buffer) {
  const char* row = row_address(side, offset);
  if (is_stored_as(side.cache.dtype, buffer) && !has_row_scales(side))
    return reinterpret_cast<const To*>(row);
  convert_row(row, side.cache.dtype, row_scale(side, position), side.width, buffer);
  return buffer;
}

}  // namespace pykvcache::KV_ISA
