// vec.h for any CPU: 4 lanes of the compiler's vector extension (SSE2, NEON).
#pragma once

namespace pykvcache::KV_ISA {

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

KV_INLINE Vec zero() { return Vec{}; }
KV_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
KV_INLINE float first_lane(Vec a) { return a[0]; }
KV_INLINE Vec as_float(IntVec a) { return reinterpret_cast<Vec>(a); }
KV_INLINE IntVec as_int(Vec a) { return reinterpret_cast<IntVec>(a); }
KV_INLINE Vec select(IntVec mask, Vec x, Vec y) {
  return as_float((mask & as_int(x)) | (~mask & as_int(y)));
}

KV_INLINE IntVec load_halves_n(const void* p, int64_t n) {
  uint16_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return IntVec{lanes[0], lanes[1], lanes[2], lanes[3]};
}
KV_INLINE void store_halves_n(void* p, IntVec a, int64_t n) {
  const uint16_t lanes[kWidth] = {static_cast<uint16_t>(a[0]), static_cast<uint16_t>(a[1]),
                                  static_cast<uint16_t>(a[2]), static_cast<uint16_t>(a[3])};
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
}

KV_INLINE Vec widen(IntVec bf16_bits) { return as_float(bf16_bits << 16); }
// Round to nearest even; NaN stays NaN.
KV_INLINE IntVec narrow(Vec a) {
  const IntVec bits = as_int(a);
  const IntVec rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  const IntVec is_nan = a != a;
  return (is_nan & 0x7fc0) | (~is_nan & rounded);
}
// Exponents are rebased by a multiplication, which also makes subnormals right.
KV_INLINE Vec widen_half(IntVec bits) {
  const IntVec magnitude = (bits & 0x7fff) << 13;
  const IntVec finite = as_int(as_float(magnitude) * broadcast(0x1p112f));
  const IntVec special = magnitude >= (0x7c00 << 13);
  return as_float(((bits & 0x8000) << 16) | finite | (special & 0x7f800000));
}
KV_INLINE IntVec narrow_half(Vec a) {
  const IntVec sign = (as_int(a) >> 16) & 0x8000;
  const IntVec magnitude = as_int(a) & 0x7fffffff;
  const IntVec rebased = magnitude - (112 << 23);
  const IntVec normal = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
  // Adding 0.5 lets the float adder round the mantissa of what becomes a subnormal.
  const IntVec small = as_int(as_float(magnitude) + broadcast(0.5f)) - (126 << 23);
  const IntVec overflow = magnitude >= ((127 + 16) << 23);
  const IntVec is_nan = a != a;
  const IntVec is_small = magnitude < (113 << 23);
  IntVec half = (is_small & small) | (~is_small & normal);
  half = (overflow & 0x7c00) | (~overflow & half);
  return sign | (is_nan & 0x7e00) | (~is_nan & half);
}

KV_INLINE Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
KV_INLINE Vec load(const BFloat16* p) { return widen(load_halves_n(p, kWidth)); }
KV_INLINE Vec load(const Float16* p) { return widen_half(load_halves_n(p, kWidth)); }
KV_INLINE Vec load_n(const float* p, int64_t n) {
  Vec a = zero();
  __builtin_memcpy(&a, p, static_cast<size_t>(n) * sizeof(float));
  return a;
}
KV_INLINE Vec load_n(const BFloat16* p, int64_t n) { return widen(load_halves_n(p, n)); }
KV_INLINE Vec load_n(const Float16* p, int64_t n) { return widen_half(load_halves_n(p, n)); }
KV_INLINE Vec load_n(const Float8* p, int64_t n) {
  uint8_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n));
  const IntVec bits = {lanes[0], lanes[1], lanes[2], lanes[3]};
  const IntVec magnitude = bits & 0x7f;
  const IntVec halves = ((bits & 0x80) << 8) | (magnitude << 7) | ((magnitude == 0x7f) & 0x7e00);
  return widen_half(halves);
}
KV_INLINE Vec load(const Float8* p) { return load_n(p, kWidth); }

KV_INLINE void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof(a)); }
KV_INLINE void store(BFloat16* p, Vec a) { store_halves_n(p, narrow(a), kWidth); }
KV_INLINE void store(Float16* p, Vec a) { store_halves_n(p, narrow_half(a), kWidth); }
KV_INLINE void store_n(float* p, Vec a, int64_t n) {
  __builtin_memcpy(p, &a, static_cast<size_t>(n) * sizeof(float));
}
KV_INLINE void store_n(BFloat16* p, Vec a, int64_t n) { store_halves_n(p, narrow(a), n); }
KV_INLINE void store_n(Float16* p, Vec a, int64_t n) { store_halves_n(p, narrow_half(a), n); }

KV_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
KV_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
KV_INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }
KV_INLINE float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
KV_INLINE float reduce_max(Vec a) { return max_of(max_of(a[0], a[1]), max_of(a[2], a[3])); }
KV_INLINE bool any_greater(Vec a, Vec b) {
  const IntVec mask = a > b;
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}
// a > b ? x : y
KV_INLINE Vec select_greater(Vec a, Vec b, Vec x, Vec y) { return select(a > b, x, y); }

// a0 b0 a1 b1 ... of the lower and of the upper halves.
KV_INLINE Vec interleave_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
KV_INLINE Vec interleave_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }

// |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
KV_INLINE Vec round(Vec a) {
  Vec shifted = a + broadcast(12582912.0f);
  asm("" : "+m"(shifted));
  return shifted - broadcast(12582912.0f);
}
constexpr float kExp2Floor = -127.0f;
// a * 2^power for whole powers from kExp2Floor, where the result is 0, to 127.
KV_INLINE Vec scale_by_power(Vec a, Vec power) {
  const IntVec whole = as_int(power + broadcast(12582912.0f)) - 0x4b400000;
  return a * as_float((whole + 127) << 23);
}

KV_INLINE Vec reduce_rows(const Vec (&rows)[kWidth]) {
  const Vec r0 = rows[0], r1 = rows[1], r2 = rows[2], r3 = rows[3];
  const Vec a = Vec{r0[0], r1[0], r2[0], r3[0]} + Vec{r0[1], r1[1], r2[1], r3[1]};
  const Vec b = Vec{r0[2], r1[2], r2[2], r3[2]} + Vec{r0[3], r1[3], r2[3], r3[3]};
  return a + b;
}

}  // namespace pykvcache::KV_ISA
