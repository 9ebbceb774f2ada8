// vec.h for AVX2 with FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

namespace pykvcache::KV_ISA {

using Vec = __m256;
constexpr int kWidth = 8;

KV_INLINE Vec zero() { return _mm256_setzero_ps(); }
KV_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
KV_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a); }

KV_INLINE Vec widen(__m128i bf16_bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16_bits), 16));
}
// Round to nearest even; NaN stays NaN.
KV_INLINE __m128i narrow(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i biased = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet_nan = _mm256_set1_epi32(0x7fc00000);
  const __m256i rounded = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(biased),
                                                               _mm256_castsi256_ps(quiet_nan),
                                                               _mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

KV_INLINE __m128i load_halves(const void* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
KV_INLINE __m128i load_halves_n(const void* p, int64_t n) {
  uint16_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_halves(lanes);
}
KV_INLINE void store_halves_n(void* p, __m128i a, int64_t n) {
  uint16_t lanes[kWidth];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), a);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
}
KV_INLINE __m256i lanes_below(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

KV_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
KV_INLINE Vec load(const BFloat16* p) { return widen(load_halves(p)); }
KV_INLINE Vec load(const Float16* p) { return _mm256_cvtph_ps(load_halves(p)); }
KV_INLINE Vec load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes_below(n)); }
KV_INLINE Vec load_n(const BFloat16* p, int64_t n) { return widen(load_halves_n(p, n)); }
KV_INLINE Vec load_n(const Float16* p, int64_t n) { return _mm256_cvtph_ps(load_halves_n(p, n)); }
KV_INLINE Vec widen_float8(__m128i bits) {
  const __m128i nan = _mm_set1_epi16(0x3f80);
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bits), 7);
  const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(shifted, nan), nan);
  const __m128i halves = _mm_and_si128(shifted, _mm_set1_epi16(static_cast<short>(0xbfff)));
  const __m128i special = _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00));
  return _mm256_cvtph_ps(_mm_or_si128(halves, special));
}
KV_INLINE Vec load(const Float8* p) {
  return widen_float8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
KV_INLINE Vec load_n(const Float8* p, int64_t n) {
  Float8 lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n));
  return load(lanes);
}

KV_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
KV_INLINE void store(BFloat16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a));
}
KV_INLINE void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
KV_INLINE void store_n(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, lanes_below(n), a); }
KV_INLINE void store_n(BFloat16* p, Vec a, int64_t n) { store_halves_n(p, narrow(a), n); }
KV_INLINE void store_n(Float16* p, Vec a, int64_t n) {
  store_halves_n(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), n);
}

KV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
KV_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
KV_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
KV_INLINE float reduce_add(Vec a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
KV_INLINE float reduce_max(Vec a) {
  __m128 best = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  best = _mm_max_ps(best, _mm_movehl_ps(best, best));
  return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
}
KV_INLINE bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
// a > b ? x : y
KV_INLINE Vec select_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

// a0 b0 a1 b1 ... of the lower and of the upper halves.
KV_INLINE Vec interleave_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
KV_INLINE Vec interleave_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

KV_INLINE Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
constexpr float kExp2Floor = -127.0f;
// a * 2^power for whole powers from kExp2Floor, where the result is 0, to 127.
KV_INLINE Vec scale_by_power(Vec a, Vec power) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

KV_INLINE Vec reduce_rows(const Vec (&rows)[kWidth]) {
  const Vec low =
      _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  const Vec high =
      _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}

}  // namespace pykvcache::KV_ISA
