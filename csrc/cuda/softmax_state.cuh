// The algebra of the online softmax (Milakov and Gimelshein, 2018): the largest score and the sum
// of 2^(score - largest) of the keys seen so far. Scores are in base 2 (they carry log2(e));
// natural logarithms only leave and enter here. A state that saw nothing is (-inf, 0).
#pragma once

#include "cuda/ptx.cuh"

namespace pykvcache::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNothing = -INFINITY;

struct SoftmaxState {
  float highest = kNothing;
  float sum = 0.0f;

  // What scores are measured from: never -inf, so that no -inf is taken from another.
  __device__ __forceinline__ float base() const { return highest == kNothing ? 0.0f : highest; }

  // Raises the maximum; returns what everything weighted so far must be multiplied by.
  __device__ __forceinline__ float raise(float new_highest) {
    const float before = highest;
    highest = fmaxf(highest, new_highest);
    const float factor = exp2_fast(before - base());
    sum *= factor;
    return factor;
  }

  // A logit that takes part in the sum and has no value.
  __device__ __forceinline__ float add_sink(float natural_logit) {
    const float factor = raise(natural_logit * kLog2e);
    sum += exp2_fast(natural_logit * kLog2e - base());
    return factor;
  }

  // What the sum and the values of other keys are multiplied by, once `highest` covers theirs.
  __device__ __forceinline__ float weight(const SoftmaxState& part) const {
    return exp2_fast(part.highest - base());
  }

  // Values times this are normalised; 0 if nothing was seen, NaN if the sum is.
  __device__ __forceinline__ float normalizer() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  __device__ __forceinline__ float lse() const {
    return sum == 0.0f ? kNothing : (base() + log2f(sum)) * kLn2;
  }
};

}  // namespace pykvcache::cuda
