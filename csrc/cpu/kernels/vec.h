// A small SIMD vocabulary over one float vector type, so that each kernel is written once. Kernel
// files are compiled once per instruction set (-DKV_ISA=...), everything lives in the namespace of
// that set, and nothing here has external linkage under a shared name: a weak symbol compiled with
// AVX-512 that the linker kept for everyone would crash older CPUs. Hence no std:: templates
// either.
//
// The instruction set's header defines
//   Vec, kWidth               float vector and its lanes
//   zero broadcast load store load_n store_n (n < kWidth lanes; the rest reads as zero)
//   fma max min reduce_add reduce_max any_greater select_greater round scale_by_power
//   reduce_rows               lane i of the result is the sum of the lanes of rows[i]
// with loads and stores for float, BFloat16 and Float16 memory, and loads for Float8, whose values
// are in kFloat8Unit. Read next: line.h.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef KV_ISA
#error "kernel files are compiled with -DKV_ISA=<instruction set>; see setup.py"
#endif

#define KV_INLINE static inline __attribute__((always_inline))

namespace pykvcache::KV_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};
struct Float8Pairs {  // the same, for queries in bfloat16
  uint8_t bits;
};
// Of what is loaded: bits of e4m3fn moved into fp16's fields read as 2^-8 times the value.
constexpr float kFloat8Unit = 256.0f;

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();

template <class T>
KV_INLINE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
KV_INLINE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
KV_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KV_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace pykvcache::KV_ISA

#if defined(__AVX512F__)
#include "cpu/kernels/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/kernels/vec_avx2.h"
#else
#include "cpu/kernels/vec_portable.h"
#endif

namespace pykvcache::KV_ISA {

// Coefficients of 2^f on [-0.5, 0.5], relative error 2e-9, exact at 0.
KV_INLINE Vec exp2_fraction(Vec f) {
  Vec p = broadcast(0.000153458124f);
  p = fma(p, f, broadcast(0.00133999309f));
  p = fma(p, f, broadcast(0.00961848907f));
  p = fma(p, f, broadcast(0.0555032864f));
  p = fma(p, f, broadcast(0.240226462f));
  p = fma(p, f, broadcast(0.693147182f));
  return fma(p, f, broadcast(1.0f));
}

// 2^x; 0 for -inf and for what would be subnormal; NaN stays NaN; x must stay below 128.
KV_INLINE Vec exp2(Vec x) {
  const Vec clamped = max(broadcast(kExp2Floor), x);  // the second one when one is NaN
  const Vec whole = round(clamped);
  return scale_by_power(exp2_fraction(clamped - whole), whole);
}

// Near 0 by its series, as 1 - 2 / (e^2x + 1) has no digits left there; NaN stays NaN.
KV_INLINE Vec tanh(Vec x) {
  const Vec square = x * x;
  const Vec slope =
      fma(fma(square, broadcast(2.0f / 15), broadcast(-1.0f / 3)), square, broadcast(1.0f));
  const Vec bounded = max(broadcast(-15.0f), min(broadcast(15.0f), x));  // x when it is NaN
  const Vec e = exp2(bounded * broadcast(2.0f * kLog2e));
  const Vec far = broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f));
  return select_greater(broadcast(1.0f / 64), square, x * slope, far);
}

template <class T>
KV_INLINE float to_float(T value) {
  return first_lane(load_n(&value, 1));
}

}  // namespace pykvcache::KV_ISA
