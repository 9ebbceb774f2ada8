// How prefill's operands come out of the cache: rows of scattered blocks, of any storage dtype and
// dequantised if they have scales, become dense tiles of words (gemm.h). Holes and padding become
// zeros, so whatever an unused slot holds never meets the arithmetic.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/paged.h"
#include "cpu/numeric.h"
#include "params.h"

namespace pykvcache::KV_ISA {

struct Float8 {
  uint8_t bits;
};

// e4m3 bits moved into fp16's fields read as 2^-8 times the value, subnormals included.
KV_INLINE Vec load_n(const Float8* p, int64_t n) {
  Float16 halves[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = p[i].bits & 0x7fu;
    const uint32_t half = magnitude == 0x7fu ? 0x7e00u : magnitude << 7;
    halves[i].bits = static_cast<uint16_t>((p[i].bits & 0x80u) << 8 | half);
  }
  return load(halves) * broadcast(256.0f);
}
KV_INLINE Vec load(const Float8* p) { return load_n(p, kWidth); }

struct RowScale {
  float all = 1.0f;
  const float* channels = nullptr;  // [n], instead of `all`
};

template <class From, class To>
KV_INLINE void convert_row(const From* from, RowScale scale, int64_t n, To* to) {
  const float* channels = scale.channels;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(to + i, load(from + i) * (channels ? load(channels + i) : broadcast(scale.all)));
  if (const int64_t left = n - i; left > 0) {
    const Vec factor = channels ? load_n(channels + i, left) : broadcast(scale.all);
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

KV_INLINE bool is_stored_as(DType dtype, const float*) { return dtype == DType::kFloat32; }
KV_INLINE bool is_stored_as(DType dtype, const BFloat16*) { return dtype == DType::kBFloat16; }

// K or V as one KV head of one batch row sees it.
struct Side {
  const CacheView& cache;
  const ScaleView& scale;
  const int32_t* blocks;  // [max_blocks]
  int64_t block_size;
  int64_t head;
  int64_t width;  // elements used of a cache row: D or Dv
};

KV_INLINE RowScale row_scale(const Side& side, int64_t position) {
  const float* scales = side.scale.data + side.head * side.scale.stride_head;
  const int64_t block = side.blocks[position / side.block_size];
  switch (side.scale.kind) {
    case ScaleKind::kNone:
      return {};
    case ScaleKind::kScalar:
    case ScaleKind::kHead:
      return {*scales};
    case ScaleKind::kSlot:
      return {scales[block * side.scale.stride_block + position % side.block_size]};
    case ScaleKind::kChannel:
      return {1.0f, scales + block * side.scale.stride_block};
  }
  return {};
}

// The row at `position`, which lies `offset` elements into the cache's first head: in place if it is
// stored as To and has no scale, else converted into `buffer`.
template <class To>
KV_INLINE const To* row_at(const Side& side, int64_t position, int64_t offset, To* buffer) {
  const int64_t element = side.head * side.cache.stride_head + offset;
  const char* row =
      static_cast<const char*>(side.cache.data) + element * element_size(side.cache.dtype);
  if (is_stored_as(side.cache.dtype, buffer) && side.scale.kind == ScaleKind::kNone)
    return reinterpret_cast<const To*>(row);
  convert_row(row, side.cache.dtype, row_scale(side, position), side.width, buffer);
  return buffer;
}

// Rows of a tile are this many words further apart than they are long: with strides that are powers
// of two a column of the tile would fall into a few sets of the L1 cache.
constexpr int64_t kRowGap = 16;

// 32-bit words along the tokens of a tile: K, V and a panel of weights stay in the L1 and L2 caches.
constexpr int64_t kTileSteps = 128;
constexpr int64_t kMaxTileTokens = 2 * kTileSteps;

// Stored tokens of one tile, in order of position, and where their rows begin (TokenCursor).
struct TokenTile {
  int64_t count;
  int64_t padded;  // count rounded up to kMaxTileRows: rows of zeros, which no query sees
  int64_t origin;  // position of the first
  int32_t positions[kMaxTileTokens];
  float places[kMaxTileTokens];  // positions from the origin; infinite for padding
  int64_t k_offsets[kMaxTileTokens];
  int64_t v_offsets[kMaxTileTokens];
};

KV_INLINE void clear_words(float* to, int64_t n) {
  __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(float));
}

// rows[i]: the words of token i's key, ceil(D / kPack) of them, in place if they can be used so and
// else in keys [padded][stride].
template <class Words>
KV_INLINE void find_keys(const Side& side, const TokenTile& tile, float* keys, int64_t stride,
                         const float** rows) {
  using Element = typename Words::Element;
  for (int64_t i = 0; i < tile.padded; ++i, keys += stride) {
    Element* buffer = reinterpret_cast<Element*>(keys);
    rows[i] = keys;
    if (i >= tile.count) {
      clear_words(keys, stride);
      continue;
    }
    const Element* row = row_at(side, tile.positions[i], tile.k_offsets[i], buffer);
    if (side.width % Words::kPack == 0) {
      rows[i] = reinterpret_cast<const float*>(row);
    } else {
      if (row != buffer)
        __builtin_memcpy(buffer, row, static_cast<size_t>(side.width) * sizeof(Element));
      buffer[side.width] = {};
    }
  }
}

// values: [padded / kPack][stride] words: element d of kPack neighbouring tokens.
template <class Words>
KV_INLINE void pack_values(const Side& side, const TokenTile& tile, float* values,
                           int64_t stride) {
  using Element = typename Words::Element;
  alignas(64) Element buffers[Words::kPack][kMaxHeadDim];
  const Element* rows[Words::kPack];
  for (int64_t i = 0; i < tile.padded; i += Words::kPack, values += stride) {
    for (int64_t j = 0; j < Words::kPack; ++j) {
      rows[j] = buffers[j];
      if (i + j < tile.count)
        rows[j] = row_at(side, tile.positions[i + j], tile.v_offsets[i + j], buffers[j]);
      else
        __builtin_memset(buffers[j], 0, sizeof(buffers[j]));
    }
    Words::interleave(rows, side.width, values);
  }
}

}  // namespace pykvcache::KV_ISA
