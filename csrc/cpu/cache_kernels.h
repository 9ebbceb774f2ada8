// Loops of the cache operators over plain pointers. Each handles a range of its outermost index, so
// that the launcher decides about threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "params.h"

namespace pykvcache {

// The one place where (block, head, slot) becomes an element index of a cache.
static inline int64_t cache_index(const CacheView& cache, int64_t block, int64_t head,
                                  int64_t slot) {
  return block * cache.stride_block + head * cache.stride_head + slot * cache.stride_slot;
}

static inline float scale_at(const ScaleView& scale, int64_t block, int64_t head, int64_t slot,
                             int64_t channel) {
  switch (scale.kind) {
    case ScaleKind::kNone:
      return 1.0f;
    case ScaleKind::kScalar:
      return scale.data[0];
    case ScaleKind::kHead:
      return scale.data[head * scale.stride_head];
    case ScaleKind::kSlot:
      return scale.data[block * scale.stride_block + head * scale.stride_head + slot];
    case ScaleKind::kChannel:
      return scale.data[block * scale.stride_block + head * scale.stride_head + channel];
  }
  return 1.0f;
}

// Tokens [begin, end) of x to their slots, cache dtype equal to x's.
inline void write_tokens(const TokenView& x, const CacheView& cache, const int64_t* slots,
                         int64_t heads, int64_t block_size, int64_t begin, int64_t end) {
  const int64_t width = element_size(cache.dtype);
  const size_t row_bytes = static_cast<size_t>(cache.head_dim * width);
  const char* source = static_cast<const char*>(x.data);
  char* target = static_cast<char*>(cache.data);
  for (int64_t t = begin; t < end; ++t) {
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / block_size, slot = slots[t] % block_size;
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(target + cache_index(cache, block, h, slot) * width,
                  source + (t * x.stride_token + h * x.stride_head) * width, row_bytes);
  }
}

constexpr float kFloat8Max = 448.0f;
constexpr float kSmallestScale = 1e-12f;

inline float scale_for(float largest) { return std::fmax(largest / kFloat8Max, kSmallestScale); }

// Scales of channels are filled by the write that covers a block's first slot.
inline void fill_channel_scales(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                                const int64_t* slots, int64_t num_tokens, int64_t heads,
                                int64_t block_size) {
  const auto value = [&](int64_t t, int64_t h, int64_t d) {
    return std::fabs(load_float(x.data, t * x.stride_token + h * x.stride_head + d, x.dtype));
  };
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots[t] < 0 || slots[t] % block_size != 0) continue;
    const int64_t block = slots[t] / block_size;
    for (int64_t h = 0; h < heads; ++h) {
      float* row = scale.data + block * scale.stride_block + h * scale.stride_head;
      for (int64_t d = 0; d < cache.head_dim; ++d) {
        float largest = 0.0f;
        for (int64_t other = 0; other < num_tokens; ++other)
          if (slots[other] >= 0 && slots[other] / block_size == block)
            largest = std::fmax(largest, value(other, h, d));
        row[d] = scale_for(largest);
      }
    }
  }
}

// Tokens [begin, end) of x to their slots as float8; scales of slots are filled.
inline void write_tokens_float8(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                                const int64_t* slots, int64_t heads, int64_t block_size,
                                int64_t begin, int64_t end) {
  const KernelTable& table = kernels();
  for (int64_t t = begin; t < end; ++t) {
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / block_size, slot = slots[t] % block_size;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t source = t * x.stride_token + h * x.stride_head;
      const char* from = static_cast<const char*>(x.data) + source * element_size(x.dtype);
      float* const own = scale.data + block * scale.stride_block + h * scale.stride_head;
      if (scale.kind == ScaleKind::kSlot)
        own[slot] = scale_for(table.largest(from, x.dtype, cache.head_dim));
      const bool by_channel = scale.kind == ScaleKind::kChannel;
      table.to_float8(from, x.dtype, cache.head_dim,
                      by_channel ? 1.0f : scale_at(scale, block, h, slot, 0),
                      by_channel ? own : nullptr,
                      static_cast<uint8_t*>(cache.data) + cache_index(cache, block, h, slot));
    }
  }
}

// Tokens [begin, end) of x to their slots, divided by scales of a head or of all.
inline void write_tokens_scaled(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                                const int64_t* slots, int64_t heads, int64_t block_size,
                                int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / block_size, slot = slots[t] % block_size;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t source = t * x.stride_token + h * x.stride_head;
      const int64_t target = cache_index(cache, block, h, slot);
      for (int64_t d = 0; d < cache.head_dim; ++d)
        store_float(cache.data, target + d, cache.dtype,
                    load_float(x.data, source + d, x.dtype) / scale_at(scale, block, h, slot, d));
    }
  }
}

// Positions [0, length) of one row to dense [length, HKV, D]; holes become zeros.
inline void gather_row(const CacheView& cache, const int32_t* blocks, int64_t length, int64_t heads,
                       int64_t block_size, char* dense) {
  const int64_t width = element_size(cache.dtype);
  const size_t row_bytes = static_cast<size_t>(cache.head_dim * width);
  const char* source = static_cast<const char*>(cache.data);
  for (int64_t position = 0; position < length; ++position) {
    const int64_t block = blocks[position / block_size], slot = position % block_size;
    for (int64_t h = 0; h < heads; ++h, dense += row_bytes) {
      if (block < 0)
        std::memset(dense, 0, row_bytes);
      else
        std::memcpy(dense, source + cache_index(cache, block, h, slot) * width, row_bytes);
    }
  }
}

// Rows [begin, end) of T * HQ: softmax states of `parts` partials combined.
// outs [S, T * HQ, D] of `dtype`, lses [S, T * HQ]; all contiguous.
inline void merge_rows(const void* outs, const float* lses, DType dtype, int64_t parts,
                       int64_t rows, int64_t head_dim, int64_t begin, int64_t end, void* out,
                       float* lse) {
  for (int64_t row = begin; row < end; ++row) {
    float top = -INFINITY;
    for (int64_t s = 0; s < parts; ++s) top = std::fmax(top, lses[s * rows + row]);
    float total = 0.0f;
    for (int64_t s = 0; s < parts && top > -INFINITY; ++s)
      total += std::exp(lses[s * rows + row] - top);
    lse[row] = total != 0.0f ? top + std::log(total) : -INFINITY;  // NaN stays NaN
    for (int64_t d = 0; d < head_dim; ++d) {
      float sum = 0.0f;
      for (int64_t s = 0; s < parts && total != 0.0f; ++s) {
        const float weight = std::exp(lses[s * rows + row] - top) / total;
        if (weight != 0.0f)
          sum += weight * load_float(outs, (s * rows + row) * head_dim + d, dtype);
      }
      store_float(out, row * head_dim + d, dtype, sum);
    }
  }
}

}  // namespace pykvcache
