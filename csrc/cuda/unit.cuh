// Units: powers of two in which numbers of any size have room in halves.
//
// Float8 is a pair of halves after one instruction, and a pair of bfloat16 after five; decode would
// spend most of the chip's issue slots on that. So it is multiplied as Half, and what has
// bfloat16's range is measured in a unit: q in one of its row, weights in kWeightUnit, values whose
// slots have scales in one of the warp that grows with the scales. That follows the largest scale
// of a key that has a weight, however small: a slot's scale may be 2^28 times another's of the
// sequence before the smaller one's values lose digits.
#pragma once

#include "cuda/ptx.cuh"

namespace pykvcache::cuda {

// Weights are at most 1. As multiples of this a half has room for those down to 2^-39.
constexpr int kWeightExponent = -15;
constexpr float kWeightUnit = 1.0f / (1 << -kWeightExponent);

// The power of two u for which |largest| / u lies in [2^kExponent, 2^(kExponent + 1)).
template <int kExponent>
__device__ __forceinline__ float unit_of(float largest) {
  constexpr uint32_t kBias = 127, kLowest = kBias - 100;
  constexpr uint32_t kHighest = 254 + (kExponent < 0 ? 2 * kExponent : 0);
  uint32_t exponent = (float_bits(largest) & 0x7fffffffu) >> 23;
  exponent = exponent < kLowest ? kLowest : exponent > kHighest ? kHighest : exponent;
  return bits_float((exponent - kExponent) << 23);
}

// 1 / unit, exact.
__device__ __forceinline__ float inverse_of(float unit) {
  return bits_float((254u << 23) - float_bits(unit));
}

}  // namespace pykvcache::cuda
