// The algebra of the online softmax, in base 2 inside: weights 2^(s - max) of scores s that already
// carry log2(e), natural logarithms at the boundary. A row without keys has sum 0, out 0, lse -inf.
#pragma once

#include "cpu/kernels/vec.h"

namespace pykvcache::KV_ISA {

// Finite, so that an empty row never computes inf - inf.
constexpr float kNoMax = -1e30f;
// The running maximum may lag behind by this much (a factor of 256) before sums are rescaled.
constexpr float kMaxLag = 8.0f;

KV_INLINE float exp2_scalar(float x) { return first_lane(exp2(broadcast(x))); }

struct Normalizer {
  float scale;  // out = sum of weights * v, times scale
  float lse;
};

// sink: nullptr, or an extra logit that takes part in the denominator only.
KV_INLINE Normalizer normalize(float max, float sum, const float* sink) {
  float shift = 1.0f;
  if (sink != nullptr) {
    const float logit = *sink * kLog2e;
    const float both = max_of(max, logit);
    shift = exp2_scalar(max - both);
    sum = sum * shift + exp2_scalar(logit - both);
    max = both;
  }
  if (!(sum > 0.0f)) return {sum == 0.0f ? 0.0f : sum, sum == 0.0f ? -kInfinity : sum};
  return {shift / sum, (max + __builtin_log2f(sum)) * kLn2};
}

// total += weight * from; total is padded to whole vectors.
KV_INLINE void add_scaled(float* total, const float* from, float weight, int64_t n) {
  int64_t d = 0;
  for (; d + kWidth <= n; d += kWidth)
    store(total + d, fma(load(from + d), broadcast(weight), load(total + d)));
  if (d < n) store(total + d, fma(load_n(from + d, n - d), broadcast(weight), load(total + d)));
}

template <class T>
KV_INLINE void store_scaled(T* to, const float* from, float scale, int64_t n) {
  int64_t d = 0;
  for (; d + kWidth <= n; d += kWidth) store(to + d, load(from + d) * broadcast(scale));
  if (d < n) store_n(to + d, load_n(from + d, n - d) * broadcast(scale), n - d);
}

}  // namespace pykvcache::KV_ISA
