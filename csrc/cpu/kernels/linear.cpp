// Linear layers of few rows in bfloat16: out = x W^T + bias, each weight read once and as it lies.
// A general matrix multiply packs W first, which for few rows costs as much as the product.
//
//   up to kDotRows rows   lanes are inputs; 16 sums of (row, output), added up across lanes at the
//   end up to kPanel rows     lanes are rows of x, as in prefill's scores (gemm.h)
//
// 16 outputs are done at a time; while their rows of W are worked on, the next ones are fetched.
#include "cpu/kernels.h"
#include "cpu/kernels/gemm.h"

namespace pykvcache::KV_ISA {

#ifndef __AVX512BF16__

int64_t linear_rows() { return 0; }
void linear_pack(const LinearParams&, float*) {}
void linear_outputs(const LinearParams&, const float*, int64_t, int64_t) {}

#else

namespace {

constexpr int kDotRows = 12;
constexpr int kDotStep = 4;  // rows that share a pass over the weights
constexpr int kOutputs = kWidth;
constexpr int kInputs = 2 * kWidth;  // of a vector

static_assert(kLinearInputs % kInputs == 0);
static_assert(kLinearPanelBytes == kPanel * sizeof(float) / 2);

KV_INLINE const BFloat16* weight_row(const LinearParams& p, int64_t output) {
  return static_cast<const BFloat16*>(p.weight) + min_of(output, p.outputs - 1) * p.inputs;
}

KV_INLINE const BFloat16* input_row(const LinearParams& p, int64_t row) {
  return static_cast<const BFloat16*>(p.x) + min_of(row, p.rows - 1) * p.inputs;
}

// 32 inputs, as words of two.
KV_INLINE Vec load_words(const BFloat16* from) {
  return load(reinterpret_cast<const float*>(from));
}

// Outputs [first, first + 16 / M) of rows [row, row + M), to sums [M][kOutputs].
template <int M>
KV_INLINE void dot_rows(const LinearParams& p, int64_t first, int64_t row, float* sums) {
  constexpr int R = kWidth / M;
  const BFloat16 *x[M], *w[R];
  for (int m = 0; m < M; ++m) x[m] = input_row(p, row + m);
  for (int r = 0; r < R; ++r) w[r] = weight_row(p, first + r);
  const int64_t ahead = kOutputs * p.inputs;
  Vec acc[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) acc[i] = zero();
  for (int64_t k = 0; k < p.inputs; k += kInputs) {
    Vec rows[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) rows[m] = load_words(x[m] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec weights = load_words(w[r] + k);
      __builtin_prefetch(w[r] + k + ahead);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc[m * R + r] = Bf16Words::multiply_add(weights, rows[m], acc[m * R + r]);
    }
  }
  alignas(64) float found[M][R];
  store(found[0], reduce_rows(acc));
  for (int m = 0; m < M; ++m) __builtin_memcpy(sums + m * kOutputs, found[m], sizeof(found[m]));
}

template <int M>
KV_INLINE void dot_outputs(const LinearParams& p, int64_t first, int64_t row,
                           float (*sums)[kOutputs]) {
  for (int r = 0; r < kOutputs; r += kWidth / M) dot_rows<M>(p, first + r, row, sums[row] + r);
}

// Outputs [first, first + kOutputs) of up to 16 C rows, to sums [rows][kOutputs]. With one vector
// of rows even and odd words have sums of their own, so that enough are in flight.
template <int C>
KV_INLINE void panel_outputs(const LinearParams& p, const float* panel, int64_t first,
                             float (*sums)[kOutputs]) {
  constexpr int R = C < 4 ? 8 : 4;
  constexpr int S = C == 1 ? 2 : 1;
  const int64_t ahead = kOutputs / 2 * p.inputs;  // words
  alignas(64) float by_output[kOutputs][C * kWidth];
  for (int base = 0; base < kOutputs; base += R) {
    const float* w[R];
    for (int r = 0; r < R; ++r)
      w[r] = reinterpret_cast<const float*>(weight_row(p, first + base + r));
    Vec acc[R][C * S];
    clear(acc);
    const float* columns = panel;
    for (int64_t step = 0; step < p.inputs / 2; step += kWidth, columns += kWidth * kPanel) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + step + ahead);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i += S) {
        Vec rows[C * S];
#pragma GCC unroll 4
        for (int c = 0; c < C * S; ++c)
          rows[c] = load(columns + (S == 1 ? i * kPanel + c * kWidth : (i + c) * kPanel));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int c = 0; c < C * S; ++c)
            acc[r][c] = Bf16Words::multiply_add(broadcast(w[r][step + i + (S == 1 ? 0 : c)]),
                                                rows[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        store(by_output[base + r] + c * kWidth, S == 1 ? acc[r][c] : acc[r][0] + acc[r][1]);
  }
  for (int c = 0; c < C; ++c) {
    Vec rows[kWidth];
    for (int i = 0; i < kOutputs; ++i) rows[i] = load(by_output[i] + c * kWidth);
    transpose(rows);
    for (int i = 0; i < kWidth; ++i) store(sums[c * kWidth + i], rows[i]);
  }
}

KV_INLINE void sum_outputs(const LinearParams& p, const float* panel, int64_t first,
                           float (*sums)[kOutputs]) {
  if (p.rows <= kDotRows) {
    for (int64_t row = 0; row < p.rows; row += kDotStep) {
      const int64_t left = p.rows - row;
      if (left == 1)
        dot_outputs<1>(p, first, row, sums);
      else if (left == 2)
        dot_outputs<2>(p, first, row, sums);
      else
        dot_outputs<kDotStep>(p, first, row, sums);
    }
    return;
  }
  static_assert(kPanelVecs == 4);
  switch (ceil_div(p.rows, kWidth)) {
    case 1:
      return panel_outputs<1>(p, panel, first, sums);
    case 2:
      return panel_outputs<2>(p, panel, first, sums);
    case 3:
      return panel_outputs<3>(p, panel, first, sums);
    default:
      return panel_outputs<4>(p, panel, first, sums);
  }
}

}  // namespace

int64_t linear_rows() { return kPanel; }

// The words of x as lanes: panel [inputs / 2][kPanel].
void linear_pack(const LinearParams& p, float* panel) {
  if (p.rows <= kDotRows) return;
  for (int64_t row = 0; row < p.rows; row += kWidth) {
    for (int64_t k = 0; k < p.inputs; k += kInputs) {
      Vec words[kWidth];
      for (int i = 0; i < kWidth; ++i) words[i] = load_words(input_row(p, row + i) + k);
      transpose(words);
      for (int i = 0; i < kWidth; ++i) store(panel + (k / 2 + i) * kPanel + row, words[i]);
    }
  }
}

void linear_outputs(const LinearParams& p, const float* panel, int64_t begin, int64_t end) {
  auto* out = static_cast<BFloat16*>(p.out);
  const auto* bias = static_cast<const BFloat16*>(p.bias);
  alignas(64) float sums[kPanel][kOutputs];
  for (int64_t first = begin; first < end; first += kOutputs) {
    const int64_t count = min_of<int64_t>(kOutputs, end - first);
    sum_outputs(p, panel, first, sums);
    const bool whole = count == kOutputs;
    Vec added = zero();
    if (bias != nullptr) added = whole ? load(bias + first) : load_n(bias + first, count);
    for (int64_t row = 0; row < p.rows; ++row) {
      const Vec value = load(sums[row]) + added;
      BFloat16* to = out + row * p.outputs + first;
      if (whole)
        store(to, value);
      else
        store_n(to, value, count);
    }
  }
}

#endif

}  // namespace pykvcache::KV_ISA
