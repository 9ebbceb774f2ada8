// One tile of tokens as the operands of prefill's two products: rows of keys, used where they lie
// if they can be, and values as a dense tile of words (gemm.h).
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace pykvcache::KV_ISA {

// Words along the tokens of a tile: a panel of weights fits the L1 cache beside its operands.
constexpr int64_t kTileSteps = 128;
constexpr int64_t kMaxTileTokens = 2 * kTileSteps;

// Rows of a tile are this many words further apart than they are long: with strides that are powers
// of two a column of the tile would fall into a few sets of the L1 cache.
constexpr int64_t kRowGap = 16;

// Stored tokens of one batch row, in order of position, and where their rows begin (TokenCursor).
struct TokenTile {
  int64_t count;
  int64_t padded;  // count rounded up to kMaxTileRows: rows that no query sees
  int32_t origin;  // position of the first
  int32_t positions[kMaxTileTokens];
  float places[kMaxTileTokens];  // positions from the origin; infinite for padding
  int64_t k_offsets[kMaxTileTokens];
  int64_t v_offsets[kMaxTileTokens];

  void take(TokenCursor& cursor, int64_t capacity) {
    count = cursor.take(capacity, positions, k_offsets, v_offsets);
    padded = round_up(count, kMaxTileRows);
    origin = count > 0 ? positions[0] : 0;
    for (int64_t i = 0; i < count; ++i) places[i] = static_cast<float>(positions[i] - origin);
    for (int64_t i = count; i < padded; ++i) places[i] = kInfinity;
  }

  // Index of the first token at or past `position`.
  int64_t find(int64_t position) const {
    const bool has_holes = positions[count - 1] - origin != count - 1;
    if (!has_holes) return max_of<int64_t>(0, min_of(position - origin, count));
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (positions[middle] < position)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

KV_INLINE void clear_words(float* to, int64_t n) {
  __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(float));
}

// rows[i]: the words of token i's key, ceil(D / kPack) of them, in place if they can be used so and
// else in buffer [padded][stride].
template <class Words>
KV_INLINE void find_keys(const Side& side, const TokenTile& tile, float* buffer, int64_t stride,
                         const float** rows) {
  using Element = typename Words::Element;
  for (int64_t i = 0; i < tile.padded; ++i, buffer += stride) {
    rows[i] = buffer;
    if (i >= tile.count) {
      clear_words(buffer, stride);
      continue;
    }
    Element* own = reinterpret_cast<Element*>(buffer);
    const Element* row = row_at(side, tile.positions[i], tile.k_offsets[i], own);
    if (side.width % Words::kPack == 0) {
      rows[i] = reinterpret_cast<const float*>(row);
      continue;
    }
    if (row != own) __builtin_memcpy(own, row, static_cast<size_t>(side.width) * sizeof(Element));
    own[side.width] = {};
  }
}

// values: [padded / kPack][stride] words: element d of kPack neighbouring tokens.
template <class Words>
KV_INLINE void pack_values(const Side& side, const TokenTile& tile, float* values, int64_t stride) {
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

// Brings the rows of the next tile closer while the current one is worked on: they lie in scattered
// blocks, which the hardware does not foresee. Inlined by force, or gcc takes functions that only
// prefetch for ones without effect and drops them.
class Lookahead {
 public:
  // share: tokens to fetch at each step of the work.
  Lookahead(const Side& keys, const Side& values, int64_t share)
      : keys_(keys), values_(values), share_(share) {}

  void restart(const TokenTile& tile) {
    tile_ = &tile;
    next_ = 0;
  }
  inline __attribute__((always_inline)) void step() {
    for (const int64_t stop = min_of(next_ + share_, tile_->count); next_ < stop; ++next_) {
      fetch_row(keys_, tile_->k_offsets[next_]);
      fetch_row(values_, tile_->v_offsets[next_]);
    }
  }

 private:
  KV_INLINE void fetch_row(const Side& side, int64_t offset) {
    const char* row = row_address(side, offset);
    const int64_t bytes = side.width * element_size(side.cache.dtype);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
  }

  const Side& keys_;
  const Side& values_;
  const int64_t share_;
  const TokenTile* tile_ = nullptr;
  int64_t next_ = 0;
};

}  // namespace pykvcache::KV_ISA
