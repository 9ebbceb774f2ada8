// Combines partial results: out = sum_s out_s exp(lse_s - lse). One warp for each query row.
#pragma once

#include "cuda/plan.cuh"

namespace pykvcache::cuda {

constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = 32 * kMergeWarps;

// The state of partials [begin, end) whose lse lies at lses[s * stride]; without a sink.
__device__ __forceinline__ SoftmaxState merged_state(const float* lses, int64_t stride,
                                                     int64_t begin, int64_t end) {
  SoftmaxState state;
  for (int64_t s = begin; s < end; ++s) state.raise(lses[s * stride] * kLog2e);
  for (int64_t s = begin; s < end; ++s) state.sum += state.weight(lses[s * stride]);
  return state;
}

// grid (B, HKV * merged_rows / kMergeWarps, rounded up): rows that nobody cut return at once.
template <class T>
__device__ __forceinline__ void merge_pieces(const KernelParams& params) {
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32;
  const int32_t index = blockIdx.y * kMergeWarps + threadIdx.x / 32;
  const auto heads = static_cast<int32_t>(p.num_kv_heads);
  const int32_t kv_head = index % heads, r = index / heads;
  const Sequence sequence = load_sequence(p, blockIdx.x);
  const SlotRange slots = row_slots(params, blockIdx.x);
  if (r >= params.merged_rows || r >= sequence.q_len * static_cast<int32_t>(params.group.divisor))
    return;
  if (slots.end - slots.begin < 2) return;
  const QueryRow query = query_row(params, sequence, kv_head, r);
  const int64_t stride = p.num_kv_heads * params.merged_rows;  // of a slot, in rows
  const int64_t first = static_cast<int64_t>(kv_head) * params.merged_rows + r;
  SoftmaxState state = merged_state(params.part_lse + first, stride, slots.begin, slots.end);
  if (p.sinks != nullptr) state.add_sink(p.sinks[query.head]);
  const int64_t place = output_place(p, sequence, query);
  for (int64_t d = lane; d < p.v_head_dim; d += 32) {
    float sum = 0.0f;
    for (int64_t s = slots.begin; s < slots.end; ++s) {
      const int64_t at = s * stride + first;
      const float weight = state.weight(params.part_lse[at]);
      if (weight != 0.0f) sum += weight * params.part_values[at * p.v_head_dim + d];
    }
    static_cast<T*>(p.out)[place * p.v_head_dim + d] = from_float<T>(sum * state.normalizer());
  }
  if (lane == 0) p.lse[place] = state.lse();
}

struct MergeStatesParams {
  const void* outs;   // [S, places, D], contiguous
  const float* lses;  // [S, places]
  void* out;          // [places, D]
  float* lse;         // [places]
  int64_t parts;
  int64_t places;  // T * HQ
  int64_t dim;
};

// grid (places / kMergeWarps, rounded up)
template <class T>
__device__ __forceinline__ void merge_states(const MergeStatesParams& p) {
  const int lane = threadIdx.x % 32;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  if (place >= p.places) return;
  const SoftmaxState state = merged_state(p.lses + place, p.places, 0, p.parts);
  for (int64_t d = lane; d < p.dim; d += 32) {
    float sum = 0.0f;
    for (int64_t s = 0; s < p.parts; ++s) {
      const int64_t at = s * p.places + place;
      const float weight = state.weight(p.lses[at]);
      if (weight != 0.0f) sum += weight * to_float(static_cast<const T*>(p.outs)[at * p.dim + d]);
    }
    static_cast<T*>(p.out)[place * p.dim + d] = from_float<T>(sum * state.normalizer());
  }
  if (lane == 0) p.lse[place] = state.lse();
}

}  // namespace pykvcache::cuda
