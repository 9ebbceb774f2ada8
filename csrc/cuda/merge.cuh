// Combines partial results: states and values of pieces of the keys, or what a caller kept of them,
// out = sum_s out_s exp(lse_s - lse).
//
// Pieces of decode: one CTA for each query row of a sequence that was cut. Every lane holds 4 dims
// and every warp takes each fourth piece, kPiecesAtOnce of them in flight: one after the other they
// would wait for memory as often as there are pieces.
#pragma once

#include "cuda/plan.cuh"

namespace pykvcache::cuda {

constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = 32 * kMergeWarps;
constexpr int kPiecesAtOnce = 8;

// The state of parts [begin, end) together, by a warp; part_of(s) is that of one.
template <class Part>
__device__ __forceinline__ SoftmaxState merged_state(const Part& part_of, int64_t begin,
                                                     int64_t end) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  SoftmaxState state;
  for (int64_t s = begin + lane; s < end; s += 32) state.raise(part_of(s).highest);
  for (int lanes = 16; lanes > 0; lanes /= 2)
    state.raise(__shfl_xor_sync(kAll, state.highest, lanes));
  for (int64_t s = begin + lane; s < end; s += 32) {
    const SoftmaxState part = part_of(s);
    state.sum += part.sum * state.weight(part);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) state.sum += __shfl_xor_sync(kAll, state.sum, lanes);
  return state;
}

// Cuts are known only on the device. When every sequence may be cut, CTAs of the grid's x are
// sequences. Otherwise they are the cuts between programs, of which there are fewer.
__host__ __device__ __forceinline__ bool merges_by_sequence(const KernelParams& params) {
  return params.piece_units > 1 || params.attention.batch < params.programs;
}
__host__ __device__ __forceinline__ int64_t merge_columns(const KernelParams& params) {
  return merges_by_sequence(params) ? params.attention.batch : params.programs - 1;
}

// The sequence of this CTA; -1 if it has none, as another CTA has the first cut in it.
__device__ __forceinline__ int32_t merged_sequence(const KernelParams& params, int lane) {
  const auto column = static_cast<int32_t>(blockIdx.x);
  if (merges_by_sequence(params)) return column;
  const auto rows = static_cast<int32_t>(params.attention.batch);
  const int32_t units = params.plan[rows];
  const int32_t sharing = sharing_programs(params, units);
  if (column + 1 >= sharing) return -1;
  const int32_t cut = share_begin(column + 1, units, sharing);
  const int32_t row = find_row_together(params.plan, rows, cut, lane);
  const int32_t begin = params.plan[row];
  return begin < cut && share_begin(column, units, sharing) <= begin ? row : -1;
}

// The sum of weight times value of the pieces begin, begin + kMergeWarps, ..., dims dim to dim + 3.
__device__ __forceinline__ float4 sum_pieces(const KernelParams& params, const SoftmaxState& state,
                                             int64_t begin, int64_t end, int64_t stride,
                                             int64_t first, int32_t dim) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t from = begin; from < end; from += kPiecesAtOnce * kMergeWarps) {
    float2 parts[kPiecesAtOnce];  // of states
    float4 values[kPiecesAtOnce];
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int64_t piece = from + i * kMergeWarps;
      const int64_t at = (piece < end ? piece : begin) * stride + first;
      parts[i] = load_now(reinterpret_cast<const float2*>(params.part_states + at));
      values[i] = load_now(reinterpret_cast<const float4*>(params.part_values +
                                                           at * params.attention.v_head_dim + dim));
    }
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const float weight =
          from + i * kMergeWarps < end ? state.weight({parts[i].x, parts[i].y}) : 0.0f;
      const bool counts = weight != 0.0f;  // otherwise its values may be anything
      sum.x += counts ? weight * values[i].x : 0.0f;
      sum.y += counts ? weight * values[i].y : 0.0f;
      sum.z += counts ? weight * values[i].z : 0.0f;
      sum.w += counts ? weight * values[i].w : 0.0f;
    }
  }
  return sum;
}

// grid (merge_columns, HKV * merged_rows), shared memory: float [kMergeWarps, Dv]
template <class T>
__device__ __forceinline__ void merge_pieces(const KernelParams& params) {
  const AttentionParams& p = params.attention;
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t row = merged_sequence(params, lane);
  if (row < 0) return;
  const auto heads = static_cast<int32_t>(p.num_kv_heads);
  const int32_t kv_head = blockIdx.y % heads, r = blockIdx.y / heads;
  const Sequence sequence = load_sequence(p, row);
  const SlotRange slots = row_slots(params, row);
  if (r >= sequence.q_len * static_cast<int32_t>(params.group.divisor)) return;
  if (slots.end - slots.begin < 2) return;
  const QueryRow query = query_row(params, sequence, kv_head, r);
  const int64_t stride = p.num_kv_heads * params.merged_rows;  // of a slot, in rows
  const int64_t first = static_cast<int64_t>(kv_head) * params.merged_rows + r;
  const auto part_of = [&](int64_t slot) { return params.part_states[slot * stride + first]; };
  SoftmaxState state = merged_state(part_of, slots.begin, slots.end);
  if (p.sinks != nullptr) state.add_sink(p.sinks[query.head]);
  const int64_t place = output_place(p, sequence, query);
  const auto dims = static_cast<int32_t>(p.v_head_dim);
  for (int32_t dim = 4 * lane; dim < dims; dim += 32 * 4) {
    const float4 sums =
        sum_pieces(params, state, slots.begin + warp, slots.end, stride, first, dim);
    *reinterpret_cast<float4*>(shared + warp * dims + dim) = sums;
  }
  // All warps' sums are written before they are added up.
  KV_OMITTABLE(merge_sum_barrier, __syncthreads());
  for (int32_t d = threadIdx.x; d < dims; d += kMergeThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kMergeWarps; ++w) sum += shared[w * dims + d];
    static_cast<T*>(p.out)[place * dims + d] = from_float<T>(sum * state.normalizer());
  }
  if (threadIdx.x == 0) p.lse[place] = state.lse();
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
  const auto part_of = [&](int64_t s) {
    return SoftmaxState{p.lses[s * p.places + place] * kLog2e, 1.0f};
  };
  const SoftmaxState state = merged_state(part_of, 0, p.parts);
  for (int64_t d = lane; d < p.dim; d += 32) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t s = 0; s < p.parts; ++s) {
      const int64_t at = s * p.places + place;
      const float weight = state.weight(part_of(s));
      const float value = to_float(static_cast<const T*>(p.outs)[at * p.dim + d]);
      sum += weight != 0.0f ? weight * value : 0.0f;
    }
    static_cast<T*>(p.out)[place * p.dim + d] = from_float<T>(sum * state.normalizer());
  }
  if (lane == 0) p.lse[place] = state.lse();
}

}  // namespace pykvcache::cuda
