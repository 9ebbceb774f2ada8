// A panel: up to kPanel query rows as lanes, and what attention does with them and one tile of
// tokens. Scores stand transposed, [tokens][kPanel], so that every row statistic (maximum, sum,
// visible range) is a lane of a vector and nothing is reduced across lanes. Read next: prefill.cpp.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/softmax.h"

namespace pykvcache::KV_ISA {

struct Panel {
  int64_t first_row;
  int64_t vecs;      // vectors that hold rows
  bool fresh;        // no tile has been added yet: `out` is undefined
  float* queries;    // [steps][kPanel] words
  float* out;        // [Dv rounded up][kPanel]
  float* max;        // [kPanel], running maximum of the scores in base 2; may lag
  float* sum;        // [kPanel]
  int32_t* low;      // [kPanel], first visible position of each row
  int32_t* end;      // [kPanel], past the last one; not above low if the row sees nothing
  int64_t seen_low;  // what any row sees
  int64_t seen_end;
  int64_t shared_low;  // what all rows see
  int64_t shared_end;
};

// Tokens [begin, end) of a tile, a multiple of kMaxTileRows, of which [open_begin, open_end) are
// seen by all rows of the panel.
struct TileRange {
  int64_t begin;
  int64_t end;
  int64_t open_begin;
  int64_t open_end;
};

// Visibility of a tile's tokens by lane; positions count from `origin` to be exact in float.
struct LaneLimits {
  float low[kPanel];
  float last[kPanel];
};

KV_INLINE LaneLimits lane_limits(const Panel& panel, int32_t origin) {
  LaneLimits limits;
  for (int i = 0; i < kPanel; ++i) {
    limits.low[i] = static_cast<float>(panel.low[i] - origin);
    limits.last[i] = static_cast<float>(panel.end[i] - origin - 1);
  }
  return limits;
}

// scores[t] = keys[t] . queries for the tokens of `range`, hidden ones -inf; tops = their maxima.
// keys: [tokens] rows of `steps` words.
template <class Words, int C>
KV_INLINE void score_tokens(const Panel& panel, const TokenTile& tile, const TileRange& range,
                            const float* const* keys, int64_t steps, Lookahead& ahead,
                            float* scores, Vec (&tops)[C]) {
  const LaneLimits limits = lane_limits(panel, tile.origin);
  constexpr int R = kTileRows<C>;
  for (int c = 0; c < C; ++c) tops[c] = broadcast(-kInfinity);
  for (int64_t t = range.begin; t < range.end; t += R) {
    ahead.step();
    Vec acc[R][C];
    clear(acc);
    multiply_rows<Words>(acc, keys + t, panel.queries, steps);
    if (t < range.open_begin || t + R > range.open_end) {
      for (int r = 0; r < R; ++r) {
        const Vec place = broadcast(tile.places[t + r]);
        for (int c = 0; c < C; ++c) {
          Vec& score = acc[r][c];
          score =
              select_greater(load(limits.low + c * kWidth), place, broadcast(-kInfinity), score);
          score =
              select_greater(place, load(limits.last + c * kWidth), broadcast(-kInfinity), score);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        store(scores + (t + r) * kPanel + c * kWidth, acc[r][c]);
        tops[c] = max(tops[c], acc[r][c]);
      }
    }
  }
}

// Raises the running maxima where they lag too far behind factor * tops. `out` must be multiplied
// by `shrink` after that, as the sums have been.
template <int C>
KV_INLINE void raise_maxima(const Panel& panel, const Vec (&tops)[C], float factor,
                            Vec (&shrink)[C]) {
  bool raised = false;
  for (int c = 0; c < C; ++c) {
    const Vec top = tops[c] * broadcast(factor);
    shrink[c] = broadcast(1.0f);
    raised |= any_greater(top, load(panel.max + c * kWidth) + broadcast(kMaxLag));
  }
  for (int c = 0; c < C && raised; ++c) {
    const Vec old = load(panel.max + c * kWidth);
    const Vec top = tops[c] * broadcast(factor);
    const Vec now = select_greater(top, old + broadcast(kMaxLag), top, old);
    shrink[c] = exp2(old - now);
    store(panel.max + c * kWidth, now);
    store(panel.sum + c * kWidth, load(panel.sum + c * kWidth) * shrink[c]);
  }
}

// Replaces scores by the words of their weights 2^(factor * score - max), in place: weights of
// token t go to row t / kPack. Adds the weights to the running sums: first among themselves, which
// rounds less over long contexts, as add_values does.
template <class Words, int C>
KV_INLINE void weigh_tokens(const Panel& panel, const TileRange& range, float factor,
                            float* scores) {
  Vec maxima[C], sums[C];
  for (int c = 0; c < C; ++c) maxima[c] = load(panel.max + c * kWidth);
  for (int c = 0; c < C; ++c) sums[c] = zero();
  for (int64_t t = range.begin; t < range.end; t += Words::kPack) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Vec weights[Words::kPack];
#pragma GCC unroll 2
      for (int j = 0; j < Words::kPack; ++j) {
        const Vec score = load(scores + (t + j) * kPanel + c * kWidth);
        weights[j] = Words::weight(fma(score, broadcast(factor), zero() - maxima[c]));
        sums[c] = sums[c] + weights[j];
      }
      store(scores + t / Words::kPack * kPanel + c * kWidth, Words::pack(weights));
    }
  }
  for (int c = 0; c < C; ++c) store(panel.sum + c * kWidth, load(panel.sum + c * kWidth) + sums[c]);
}

// out = out * shrink + values^T * weights. values: [tokens / kPack][stride] words.
template <class Words, int C>
KV_INLINE void add_values(const Panel& panel, const float* values, int64_t stride, int64_t width,
                          const TileRange& range, const float* weights, const Vec (&shrink)[C]) {
  constexpr int R = kTileRows<C>;
  const int64_t first = range.begin / Words::kPack;
  const int64_t steps = range.end / Words::kPack - first;
  for (int64_t d = 0; d < width; d += R) {
    Vec acc[R][C];
    clear(acc);
    multiply_columns<Words>(acc, values + first * stride + d, stride, weights + first * kPanel,
                            steps);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* out = panel.out + (d + r) * kPanel + c * kWidth;
        store(out, panel.fresh ? acc[r][c] : fma(load(out), shrink[c], acc[r][c]));
      }
    }
  }
}

}  // namespace pykvcache::KV_ISA
