// Score modifications beyond a plain scale: softcap, ALiBi and bias, in the order of the contract.
#pragma once

#include "cpu/kernels/pack.h"
#include "cpu/kernels/panel.h"
#include "cpu/numeric.h"
#include "params.h"

namespace pykvcache::KV_ISA {

// What the modifications need to know of a panel's query rows.
struct LaneLogits {
  float slope[kPanel];       // ALiBi
  float place[kPanel];       // of the query, from the tile's origin
  int64_t bias_row[kPanel];  // element of bias[b, h, i, 0]
};

KV_INLINE bool has_plain_logits(const AttentionParams& p, float scale) {
  return p.softcap == 0.0f && p.alibi_slopes == nullptr && p.bias.data == nullptr && scale > 0.0f;
}

KV_INLINE Vec gather_bias(const BiasView& bias, const int64_t* rows, int64_t position) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    const float value = load_float(bias.data, rows[i] + position * bias.stride_key, bias.dtype);
    lanes[i] = bias.dtype != DType::kBool ? value : value != 0.0f ? 0.0f : -kInfinity;
  }
  return load(lanes);
}

// Lower than any logit that matters and far above softmax.h's kNoMax, so that a row whose keys all
// have a bias of the lowest float still spreads its weight evenly.
constexpr float kLowestLogit = -3e29f;
constexpr float kLowestFloat = -3.402823466e38f;

// Turns raw scores q . k into final logits in base 2. What was hidden (-inf) stays so.
template <int C>
KV_INLINE void modify_logits(const AttentionParams& p, float scale, const LaneLogits& lanes,
                             const TokenTile& tile, const TileRange& range, float* scores,
                             Vec (&tops)[C]) {
  for (int c = 0; c < C; ++c) tops[c] = broadcast(-kInfinity);
  for (int64_t t = range.begin; t < min_of(range.end, tile.count); ++t) {
    for (int c = 0; c < C; ++c) {
      float* at = scores + t * kPanel + c * kWidth;
      const Vec raw = load(at);
      Vec logit = raw * broadcast(scale);
      if (p.softcap > 0.0f)
        logit = broadcast(p.softcap) * tanh(logit * broadcast(1.0f / p.softcap));
      if (p.alibi_slopes != nullptr)
        logit = fma(load(lanes.slope + c * kWidth),
                    broadcast(tile.places[t]) - load(lanes.place + c * kWidth), logit);
      if (p.bias.data != nullptr)
        logit = logit + gather_bias(p.bias, lanes.bias_row + c * kWidth, tile.positions[t]);
      const Vec lowest = broadcast(kLowestFloat), hidden = broadcast(-kInfinity);
      Vec final = max(broadcast(kLowestLogit), logit) * broadcast(kLog2e);  // NaN stays
      final = select_greater(lowest, logit, hidden, final);
      final = select_greater(lowest, raw, hidden, final);  // a scale <= 0 has made it NaN or +inf
      store(at, final);
      tops[c] = max(tops[c], final);
    }
  }
}

}  // namespace pykvcache::KV_ISA
