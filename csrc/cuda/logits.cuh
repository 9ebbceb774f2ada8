// From q . k to the logit of the softmax, and which keys a query sees.
#pragma once

#include "cuda/paged_kv.cuh"
#include "cuda/softmax_state.cuh"

namespace pykvcache::cuda {

// Keys [begin, end) that a query may see. Holes and bias hide more.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

// A query before position 0 is padding and sees nothing.
__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, const Sequence& sequence,
                                                 int32_t position) {
  if (position < 0) return {0, 0};
  int64_t begin = 0;
  if (p.window > 0) begin = position - p.window + 1;
  if (p.chunk > 0) {
    const int64_t chunk_begin = position / p.chunk * p.chunk;
    if (chunk_begin > begin) begin = chunk_begin;
  }
  const int32_t end = p.causal && position + 1 < sequence.kv_len ? position + 1 : sequence.kv_len;
  return {begin > 0 ? static_cast<int32_t>(begin) : 0, end};
}

// One query row of a sequence: token row / G, head row % G of its KV head.
struct QueryRow {
  int32_t token;     // of the sequence
  int32_t head;      // of all query heads
  int32_t position;  // of the sequence
};

__device__ __forceinline__ QueryRow query_row(const KernelParams& params, const Sequence& sequence,
                                              int32_t kv_head, int32_t row) {
  const int32_t token = params.group.quotient(row);
  const int32_t group = static_cast<int32_t>(params.group.divisor);
  return {token, kv_head * group + row - token * group, sequence.kv_len - sequence.q_len + token};
}

// The query rows of a warp or CTA: rows from `first` of the q_len * G of a sequence.
struct WarpRows {
  Sequence sequence;
  int32_t kv_head;
  int32_t first;
  int32_t end;  // q_len * G; rows from here on are not there
};

// Index of a query row in lse [T, HQ], and in out after a multiplication by Dv.
__device__ __forceinline__ int64_t output_place(const AttentionParams& p, const Sequence& sequence,
                                                const QueryRow& row) {
  return static_cast<int64_t>(sequence.q_begin + row.token) * p.num_heads + row.head;
}

__device__ __forceinline__ bool has_plain_logits(const AttentionParams& p) {
  return p.softcap == 0.0f && p.alibi_slopes == nullptr && p.bias.data == nullptr &&
         p.k_scale.kind != ScaleKind::kSlot;
}

// Near 0 by its series, as 1 - 2 / (e^2x + 1) has no digits left there.
__device__ __forceinline__ float bounded_tanh(float x) {
  const float square = x * x;
  if (square < 1.0f / 64) return x * (1.0f + square * (square * (2.0f / 15) - 1.0f / 3));
  const float bounded = x > 15.0f ? 15.0f : x;  // not fminf, which would hide NaN
  return 1.0f - 2.0f / (exp2_fast(bounded * (2.0f * kLog2e)) + 1.0f);
}

__device__ __forceinline__ float load_bias(const BiasView& bias, int64_t at) {
  switch (bias.dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const Half*>(bias.data)[at]);
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(bias.data)[at]);
    case DType::kBool:
      return static_cast<const uint8_t*>(bias.data)[at] ? 0.0f : kNothing;
    default:
      return static_cast<const float*>(bias.data)[at];
  }
}

// The logit in base 2 of a score that is already scaled: softcap, then ALiBi, then bias.
__device__ __forceinline__ float modified_logit(const AttentionParams& p, const Sequence& sequence,
                                                const QueryRow& row, int32_t key, float score) {
  if (p.softcap > 0.0f) score = p.softcap * bounded_tanh(score / p.softcap);
  if (p.alibi_slopes != nullptr)
    score += p.alibi_slopes[row.head] * static_cast<float>(key - row.position);
  if (p.bias.data != nullptr) {
    const float bias =
        load_bias(p.bias, sequence.row * p.bias.stride_batch + row.head * p.bias.stride_head +
                              row.token * p.bias.stride_query + key * p.bias.stride_key);
    if (bias == kNothing) return kNothing;
    // The lowest float must not become -inf, which would say that nothing is seen.
    const float logit = (score + bias) * kLog2e;
    return logit < -3e38f ? -3e38f : logit;
  }
  return score * kLog2e;
}

}  // namespace pykvcache::cuda
