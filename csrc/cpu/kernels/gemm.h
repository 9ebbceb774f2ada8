// The register-blocked product that prefill is made of: acc += A * B, where the lanes of B's
// vectors are query rows and the elements of A are broadcast. Operands are made of 32-bit words,
// and a word is one float or a pair of bf16 numbers that are neighbours along the summed dimension,
// which is what the bf16 dot instruction takes. So one layout and one loop serve both.
#pragma once

#include "cpu/kernels/vec.h"

namespace pykvcache::KV_ISA {

constexpr int kPanelVecs = kWidth == 16 ? 4 : 2;
constexpr int kPanel = kPanelVecs * kWidth;  // query rows that are lanes of one panel

// Rows of A in registers for C vectors of B: enough sums in flight to hide the latency.
template <int C>
constexpr int kTileRows = 2 * C > kPanelVecs ? 4 : 8;
constexpr int kMaxTileRows = 8;

struct Fp32Words {
  using Element = float;
  static constexpr int kPack = 1;
  KV_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  KV_INLINE Vec weight(Vec x) { return exp2(x); }
  KV_INLINE Vec pack(const Vec (&weights)[kPack]) { return weights[0]; }
  KV_INLINE void interleave(const float* const (&rows)[kPack], int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t lanes = min_of<int64_t>(kWidth, n - i);
      store(to + i, load_n(rows[0] + i, lanes));
    }
  }
};

#ifdef __AVX512BF16__
// 2^x to a relative error of 3e-6, for weights that are rounded to bf16 anyway; 0 from x = -127
// down.
KV_INLINE Vec exp2_short(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits are a whole number
  const Vec clamped = max(broadcast(-127.0f), x);
  const Vec whole = clamped + shift;
  const Vec f = clamped - (whole - shift);
  Vec p = broadcast(0.0095828532f);
  p = fma(p, f, broadcast(0.0559064252f));
  p = fma(p, f, broadcast(0.240240986f));
  p = fma(p, f, broadcast(0.693124193f));
  p = fma(p, f, broadcast(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

struct Bf16Words {
  using Element = BFloat16;
  static constexpr int kPack = 2;
  KV_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  KV_INLINE Vec weight(Vec x) { return exp2_short(x); }
  KV_INLINE Vec pack(const Vec (&weights)[kPack]) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0]));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(pair_order(0, 16), halves));
  }
  // to[2 * i + j] = rows[j][i]
  KV_INLINE void interleave(const BFloat16* const (&rows)[kPack], int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 32, to += 2 * kWidth) {
      const int64_t left = n - i < 32 ? n - i : 32;
      const __mmask32 lanes = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      const __m512i first = _mm512_maskz_loadu_epi16(lanes, rows[0] + i);
      const __m512i second = _mm512_maskz_loadu_epi16(lanes, rows[1] + i);
      const __m512i low = _mm512_permutex2var_epi16(first, pair_order(0, 32), second);
      const __m512i high = _mm512_permutex2var_epi16(first, pair_order(16, 48), second);
      store(to, _mm512_castsi512_ps(low));
      if (left > kWidth) store(to + kWidth, _mm512_castsi512_ps(high));
    }
  }

 private:
  // even + 0, odd + 0, even + 1, odd + 1, ...
  KV_INLINE __m512i pair_order(int even, int odd) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)),
                            _mm512_set1_epi32(odd << 16 | even));
  }
};
#endif

// Without this gcc turns a vector that is used several times into several memory operands, and the
// loop becomes bound by its loads.
KV_INLINE void keep_in_register([[maybe_unused]] Vec& a) {
#if defined(__AVX512F__)
  asm("" : "+v"(a));
#elif defined(__SSE__)
  asm("" : "+x"(a));
#elif defined(__aarch64__)
  asm("" : "+w"(a));
#endif
}

template <int R, int C>
KV_INLINE void clear(Vec (&acc)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
}

// acc[r] += sum over steps of at(r, step) * b[step], of which C vectors are used.
// b: [steps][kPanel] words.
template <class Words, int R, int C, class At>
KV_INLINE void multiply(Vec (&acc)[R][C], const float* b, int64_t steps, At at) {
  for (int64_t step = 0; step < steps; ++step, b += kPanel) {
    Vec columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      columns[c] = load(b + c * kWidth);
      keep_in_register(columns[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec element = broadcast(at(r, step));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Words::multiply_add(element, columns[c], acc[r][c]);
    }
  }
}

// A by rows: rows[r][step].
template <class Words, int R, int C>
KV_INLINE void multiply_rows(Vec (&acc)[R][C], const float* const* rows, const float* b,
                             int64_t steps) {
  const float* local[R];
  for (int r = 0; r < R; ++r) local[r] = rows[r];
  multiply<Words>(acc, b, steps, [&](int r, int64_t step) { return local[r][step]; });
}

// A by columns: columns[step * stride + r].
template <class Words, int R, int C>
KV_INLINE void multiply_columns(Vec (&acc)[R][C], const float* columns, int64_t stride,
                                const float* b, int64_t steps) {
  multiply<Words>(acc, b, steps, [&](int r, int64_t step) { return columns[step * stride + r]; });
}

// The kWidth x kWidth words at `rows`, transposed in registers: vector i of the result holds word i
// of every row.
KV_INLINE void transpose(Vec (&rows)[kWidth]) {
  for (int stage = 1; stage < kWidth; stage *= 2) {
    Vec mixed[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2]);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = mixed[i];
  }
}

}  // namespace pykvcache::KV_ISA
