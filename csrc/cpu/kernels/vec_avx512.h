// vec.h for AVX-512 (F, BW, DQ, VL): 16 lanes.
#pragma once

// gcc 12 takes the undefined operands inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace pykvcache::KV_ISA {

using Vec = __m512;
constexpr int kWidth = 16;

KV_INLINE __mmask16 lanes_below(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

KV_INLINE Vec zero() { return _mm512_setzero_ps(); }
KV_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
KV_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a); }

KV_INLINE Vec widen(__m256i bf16_bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits), 16));
}
// Round to nearest even; NaN stays NaN.
KV_INLINE __m256i narrow(Vec a) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i biased = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i rounded = _mm512_mask_mov_epi32(biased, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                                _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

KV_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
KV_INLINE Vec load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KV_INLINE Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KV_INLINE Vec load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
KV_INLINE Vec load_n(const BFloat16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
KV_INLINE Vec load_n(const Float16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
// A NaN is both 0x7f and 0xff.
KV_INLINE Vec widen_float8(__m128i bits) {
  const __m128i sign = _mm_set1_epi8(static_cast<char>(0x80));
  const __mmask16 numbers = _mm_cmpneq_epi8_mask(_mm_or_si128(bits, sign), _mm_set1_epi8(-1));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bits), 7),
                                          _mm256_set1_epi16(static_cast<short>(0xbfff)));
  return _mm512_mask_cvtph_ps(_mm512_set1_ps(__builtin_nanf("")), numbers, halves);
}
KV_INLINE Vec load(const Float8* p) {
  return widen_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KV_INLINE Vec load_n(const Float8* p, int64_t n) {
  return widen_float8(_mm_maskz_loadu_epi8(lanes_below(n), p));
}

KV_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
KV_INLINE void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
KV_INLINE void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
KV_INLINE void store_n(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, lanes_below(n), a); }
KV_INLINE void store_n(BFloat16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), narrow(a));
}
KV_INLINE void store_n(Float16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

KV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
KV_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
KV_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
KV_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
KV_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
KV_INLINE bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// a > b ? x : y
KV_INLINE Vec select_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

// a0 b0 a1 b1 ... of the lower and of the upper halves.
KV_INLINE Vec interleave_low(Vec a, Vec b) {
  return _mm512_permutex2var_ps(
      a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
KV_INLINE Vec interleave_high(Vec a, Vec b) {
  return _mm512_permutex2var_ps(
      a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}

KV_INLINE Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
constexpr float kExp2Floor = -160.0f;
// a * 2^power for whole powers; 0 at kExp2Floor.
KV_INLINE Vec scale_by_power(Vec a, Vec power) { return _mm512_scalef_ps(a, power); }

KV_INLINE Vec add_even_odd(Vec a, Vec b) {
  return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
}
KV_INLINE Vec add_pairs(Vec a, Vec b) {
  return _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
}

KV_INLINE Vec reduce_rows(const Vec (&rows)[kWidth]) {
  Vec quads[4];  // lane 4 * j + i of quads[q]: partial sum of row 4 * q + i
  for (int q = 0; q < 4; ++q)
    quads[q] = add_pairs(add_even_odd(rows[4 * q], rows[4 * q + 1]),
                         add_even_odd(rows[4 * q + 2], rows[4 * q + 3]));
  const Vec low = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) +
                  _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  const Vec high = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) +
                   _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

// R vectors of R equal pieces: piece j of vector i becomes piece i of vector j.
KV_INLINE void split_rows(Vec (&)[1]) {}
KV_INLINE void split_rows(Vec (&rows)[2]) {
  const Vec first = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44);
  rows[1] = _mm512_shuffle_f32x4(rows[0], rows[1], 0xee);
  rows[0] = first;
}
KV_INLINE void split_rows(Vec (&rows)[4]) {
  const Vec low_01 = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44);
  const Vec high_01 = _mm512_shuffle_f32x4(rows[0], rows[1], 0xee);
  const Vec low_23 = _mm512_shuffle_f32x4(rows[2], rows[3], 0x44);
  const Vec high_23 = _mm512_shuffle_f32x4(rows[2], rows[3], 0xee);
  rows[0] = _mm512_shuffle_f32x4(low_01, low_23, 0x88);
  rows[1] = _mm512_shuffle_f32x4(low_01, low_23, 0xdd);
  rows[2] = _mm512_shuffle_f32x4(high_01, high_23, 0x88);
  rows[3] = _mm512_shuffle_f32x4(high_01, high_23, 0xdd);
}

}  // namespace pykvcache::KV_ISA
