// Scalar conversions between float and the storage types, bit by bit, with no dependency.
// Vector code has its own in kernels/vec.h; this is for cache operators and tails.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace pykvcache {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static inline float bfloat16_to_float(uint16_t x) { return bits_float(uint32_t{x} << 16); }

static inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float float16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

static inline uint16_t float_to_float16(float x) {
  const uint32_t bits = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;    // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;   // rounds past 65504
  if (magnitude < 0x38800000u) {                         // below 2^-14: a multiple of 2^-24
    const float shifted = bits_float(magnitude) + 0.5f;  // the sum's last bit is worth 2^-24
    return static_cast<uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// e4m3fn: 4 exponent bits, 3 mantissa bits, no infinity, one NaN (0x7f), largest 448.
static inline float float8_to_float(uint8_t x) {
  const uint32_t sign = uint32_t{x & 0x80u} << 24;
  const uint32_t magnitude = x & 0x7fu;
  if (magnitude == 0x7fu) return bits_float(sign | 0x7fc00000u);
  if (magnitude >= 8u) return bits_float(sign | ((magnitude << 20) + (120u << 23)));
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-9f));
}

// Rounds to nearest even and saturates at 448. Without branches, so that loops of it are vectors.
static inline uint8_t float_to_float8(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float shifted = bits_float(magnitude) + 0x1p14f;  // the sum's last bit is worth 2^-9
  const uint32_t small = float_bits(shifted) - float_bits(0x1p14f);  // a multiple of 2^-9
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  uint32_t code = (rounded - (120u << 23)) >> 20;
  code = magnitude < float_bits(0x1p-6f) ? small : code;
  code = magnitude >= float_bits(448.0f) ? 0x7eu : code;
  code = magnitude > 0x7f800000u ? 0x7fu : code;
  return static_cast<uint8_t>((bits >> 24 & 0x80u) | (code & 0x7fu));
}

static inline float load_float(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kFloat8E4M3:
      return float8_to_float(static_cast<const uint8_t*>(data)[index]);
    case DType::kBool:
      return static_cast<const uint8_t*>(data)[index] ? 1.0f : 0.0f;
  }
  return 0.0f;
}

static inline void store_float(void* data, int64_t index, DType dtype, float x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[index] = x;
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_float16(x);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bfloat16(x);
      break;
    case DType::kFloat8E4M3:
      static_cast<uint8_t*>(data)[index] = float_to_float8(x);
      break;
    case DType::kBool:
      static_cast<uint8_t*>(data)[index] = x != 0.0f;
      break;
  }
}

static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat8E4M3:
    case DType::kBool:
      return 1;
  }
  return 0;
}

}  // namespace pykvcache
