// How cache rows enter the two products of attention, one cache line (64 bytes of a row) at a time:
// scores += q . k over a line, and out += p * v over a line. Storage types are widened to float on
// load; bf16 with AVX512_BF16 uses the pair dot product instead, for V on pairs of tokens.
#pragma once

#include "cpu/kernels/vec.h"

namespace pykvcache::KV_ISA {

constexpr int kLineBytes = 64;
constexpr int kTick = 4;  // rows of a dot() between two calls of its tick
#if defined(__AVX512F__)
constexpr int kAccumulators = 16;  // registers that hold sums; the rest hold operands
#else
constexpr int kAccumulators = 8;
#endif

template <class T>
struct Line {
  using Query = float;  // what q is stored as for dot()
  using Prob = float;   // what p is stored as for accumulate()
  static constexpr int kElems = kLineBytes / static_cast<int>(sizeof(T));
  static constexpr int kVecs = kElems / kWidth;
  static constexpr int kTokens = 1;                // tokens that accumulate() takes at once
  static constexpr bool kScaled = sizeof(T) == 1;  // float8: with scales, and q of any type
  static constexpr float kUnit = kScaled ? kFloat8Unit : 1.0f;  // of what is loaded

  template <class From>
  KV_INLINE void pack_query(Query* to, const From* from, int64_t n) {
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth) store(to + d, load(from + d));
    if (d < n) store_n(to + d, load_n(from + d, n - d), n - d);
  }

  // sums[r * N + t] += q[r] . rows[t] over the `n` elements from `offset`; kTail: n < kElems. Calls
  // tick() before every kTick rows.
  template <int R, int N, bool kTail>
  KV_INLINE void dot(Vec (&sums)[R * N], const Query* q, int64_t q_stride, const T* const* rows,
                     int64_t offset, int n, auto&& tick) {
    for (int c = 0; c < kVecs; ++c) {
      const int left = n - c * kWidth;
      if (kTail && left <= 0) return;
      const int64_t at = offset + c * kWidth;
      Vec query[R];
      for (int r = 0; r < R; ++r) query[r] = load(q + r * q_stride + at);
      for (int t = 0; t < N; ++t) {
        if (c == 0 && t % kTick == 0) tick();
        const Vec key = kTail && left < kWidth ? load_n(rows[t] + at, left) : load(rows[t] + at);
        for (int r = 0; r < R; ++r) sums[r * N + t] = fma(query[r], key, sums[r * N + t]);
      }
    }
  }

  // out[r * L * kVecs + ...] += probs[r][0] * rows[0] over L lines from `offset`.
  template <int R, int L, bool kTail>
  KV_INLINE void accumulate(Vec (&out)[R * L * kVecs], const Prob* probs, int64_t prob_stride,
                            const T* const* rows, int64_t offset, int n) {
    Vec weight[R];
    for (int r = 0; r < R; ++r) weight[r] = broadcast(probs[r * prob_stride]);
    for (int c = 0; c < L * kVecs; ++c) {
      const int left = n - c * kWidth;
      if (kTail && left <= 0) return;
      const T* from = rows[0] + offset + c * kWidth;
      const Vec value = kTail && left < kWidth ? load_n(from, left) : load(from);
      for (int r = 0; r < R; ++r)
        out[r * L * kVecs + c] = fma(weight[r], value, out[r * L * kVecs + c]);
    }
  }

  // Accumulators of one line to the order of the row.
  KV_INLINE void restore_order(float*) {}
};

#if defined(__AVX512BF16__)
template <>
struct Line<BFloat16> {
  using Query = BFloat16;
  using Prob = BFloat16;
  static constexpr int kElems = 32;
  static constexpr int kVecs = 2;
  static constexpr int kTokens = 2;
  static constexpr bool kScaled = false;

  KV_INLINE void pack_query(Query* to, const BFloat16* from, int64_t n) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(BFloat16));
  }

  KV_INLINE __m512i load_line(const BFloat16* p) { return _mm512_loadu_si512(p); }
  KV_INLINE __m512i load_line_n(const BFloat16* p, int n) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1u, p);
  }
  KV_INLINE Vec pair_dot(Vec sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <int R, int N, bool kTail>
  KV_INLINE void dot(Vec (&sums)[R * N], const Query* q, int64_t q_stride,
                     const BFloat16* const* rows, int64_t offset, int n, auto&& tick) {
    __m512i query[R];
    for (int r = 0; r < R; ++r) query[r] = load_line(q + r * q_stride + offset);
    for (int t = 0; t < N; ++t) {
      if (t % kTick == 0) tick();
      const __m512i key = kTail ? load_line_n(rows[t] + offset, n) : load_line(rows[t] + offset);
      for (int r = 0; r < R; ++r) sums[r * N + t] = pair_dot(sums[r * N + t], query[r], key);
    }
  }

  // Interleaves two rows so that each 32-bit lane holds one dimension of both tokens; the unpack
  // works inside 128-bit lanes, hence restore_order().
  template <int R, int L, bool kTail>
  KV_INLINE void accumulate(Vec (&out)[R * L * kVecs], const Prob* probs, int64_t prob_stride,
                            const BFloat16* const* rows, int64_t offset, int n) {
    __m512i weight[R];
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, probs + r * prob_stride, sizeof(pair));
      weight[r] = _mm512_set1_epi32(pair);
    }
    for (int l = 0; l < L; ++l) {
      const int64_t at = offset + l * kElems;
      const __m512i first = kTail ? load_line_n(rows[0] + at, n) : load_line(rows[0] + at);
      const __m512i second = kTail ? load_line_n(rows[1] + at, n) : load_line(rows[1] + at);
      const __m512i low = _mm512_unpacklo_epi16(first, second);
      const __m512i high = _mm512_unpackhi_epi16(first, second);
      for (int r = 0; r < R; ++r) {
        Vec* sums = &out[(r * L + l) * kVecs];
        sums[0] = pair_dot(sums[0], low, weight[r]);
        sums[1] = pair_dot(sums[1], high, weight[r]);
      }
    }
  }

  KV_INLINE void restore_order(float* line) {
    const Vec low = load(line);
    const Vec high = load(line + kWidth);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(line, _mm512_permutex2var_ps(low, first, high));
    store(line + kWidth, _mm512_permutex2var_ps(low, second, high));
  }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define KV_FLOAT8_PAIRS 1
// Of the bfloat16 of every code without its sign; one byte each.
struct Float8Codes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Float8Codes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      int exponent = (code >> 3) - 7 + 127, mantissa = code & 7;
      if (code < 8 && code > 0)  // subnormal: a multiple of 2^-9
        for (++exponent; mantissa < 8; --exponent) mantissa *= 2;
      int bits = exponent << 7 | (mantissa & 7) << 4;
      if (code == 0) bits = 0;
      if (code == 0x7f) bits = 0x7fc0;
      low[code] = static_cast<uint8_t>(bits & 0xff);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
static constexpr Float8Codes kFloat8Codes{};

// Float8 with queries in bfloat16: two look-ups of bytes make bfloat16 of a line's 64 codes, then
// it is as above. Two vectors hold a line: of every 16 elements, the first the lower 8.
template <>
struct Line<Float8Pairs> {
  using Query = BFloat16;
  using Prob = BFloat16;
  using Bf16 = Line<BFloat16>;
  static constexpr int kElems = 64;
  static constexpr int kVecs = 4;
  static constexpr int kTokens = 2;
  static constexpr bool kScaled = true;
  static constexpr float kUnit = 1.0f;

  KV_INLINE int element(int i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

  KV_INLINE void pack_query(Query* to, const BFloat16* from, int64_t n) {
    for (int64_t line = 0; line < n; line += kElems)
      for (int i = 0; i < kElems; ++i)
        if (line + element(i) < n) to[line + i] = from[line + element(i)];
  }

  template <bool kTail>
  KV_INLINE void load_line(const Float8Pairs* from, int n, __m512i (&to)[2]) {
    const __m512i codes =
        kTail ? _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, from) : _mm512_loadu_si512(from);
    const auto look_up = [&](const uint8_t* table) __attribute__((always_inline)) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes,
                                      _mm512_load_si512(table + 64));
    };
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low = look_up(kFloat8Codes.low);
    const __m512i high = _mm512_ternarylogic_epi32(look_up(kFloat8Codes.high), codes, sign, kOrAnd);
    to[0] = _mm512_unpacklo_epi8(low, high);
    to[1] = _mm512_unpackhi_epi8(low, high);
  }

  template <int R, int N, bool kTail>
  KV_INLINE void dot(Vec (&sums)[R * N], const Query* q, int64_t q_stride,
                     const Float8Pairs* const* rows, int64_t offset, int n, auto&& tick) {
    for (int t = 0; t < N; ++t) {
      if (t % kTick == 0) tick();
      __m512i keys[2];
      load_line<kTail>(rows[t] + offset, n, keys);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i)
          sums[r * N + t] = Bf16::pair_dot(
              sums[r * N + t], Bf16::load_line(q + r * q_stride + offset + i * 32), keys[i]);
    }
  }

  template <int R, int L, bool kTail>
  KV_INLINE void accumulate(Vec (&out)[R * L * kVecs], const Prob* probs, int64_t prob_stride,
                            const Float8Pairs* const* rows, int64_t offset, int n) {
    for (int l = 0; l < L; ++l) {
      __m512i first[2], second[2];
      load_line<kTail>(rows[0] + offset + l * kElems, n, first);
      load_line<kTail>(rows[1] + offset + l * kElems, n, second);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, probs + r * prob_stride, sizeof(pair));
        const __m512i weight = _mm512_set1_epi32(pair);
        Vec* sums = &out[(r * L + l) * kVecs];
        for (int i = 0; i < 2; ++i) {
          sums[2 * i] =
              Bf16::pair_dot(sums[2 * i], _mm512_unpacklo_epi16(first[i], second[i]), weight);
          sums[2 * i + 1] =
              Bf16::pair_dot(sums[2 * i + 1], _mm512_unpackhi_epi16(first[i], second[i]), weight);
        }
      }
    }
  }

  // Lane 4 j + i of vector v has element 16 j + 4 v + i.
  KV_INLINE void restore_order(float* line) {
    float values[kElems];
    __builtin_memcpy(values, line, sizeof(values));
    for (int v = 0; v < kVecs; ++v)
      for (int lane = 0; lane < kWidth; ++lane)
        line[lane / 4 * 16 + 4 * v + lane % 4] = values[v * kWidth + lane];
  }
};
#endif

}  // namespace pykvcache::KV_ISA
