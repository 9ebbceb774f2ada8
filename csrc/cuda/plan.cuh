// Which part of a decode step each CTA does, on the device: stream-K (Osama et al., 2023).
//
// The units (64 keys) of all sequences lie end to end, cut evenly over the CTAs of a KV head:
//
//   units     0      3 4            9         12     rows 0 to 3 have 3, 1, 5 and 3 units
//   rows      |--0---|1|-----2------|----3----|
//   programs  |----0----|----1----|-----2-----|      3 programs do 4 units each
//
// Row 2 is cut: programs 1 and 2 leave partial results in slots program + row, which no two pieces
// share because both only grow along the line; merge.cuh combines them. The plan holds the running
// sum of units only, so a captured graph stays right while sequences grow. When deterministic, an
// entry counts pieces of 1,024 keys at fixed positions instead, and piece i has slot i.
#pragma once

#include "cuda/logits.cuh"

namespace pykvcache::cuda {

// Units [begin, end) of kUnit keys that the queries of a sequence see.
struct UnitRange {
  int32_t begin;
  int32_t end;
};

__device__ __forceinline__ UnitRange visible_units(const AttentionParams& p,
                                                   const Sequence& sequence) {
  const int32_t first = sequence.kv_len - sequence.q_len;  // the lowest position sees furthest back
  const KeyRange keys = visible_keys(p, sequence, first > 0 ? first : 0);
  return {keys.begin / kUnit, (sequence.kv_len + kUnit - 1) / kUnit};
}

// Entries of the plan that a sequence has: at least one if decode takes it, so that somebody writes
// its result; none otherwise.
__device__ __forceinline__ int32_t plan_entries(const KernelParams& params,
                                                const Sequence& sequence) {
  const int64_t rows = static_cast<int64_t>(sequence.q_len) * params.group.divisor;
  if (sequence.q_len <= 0 || rows > params.decode_rows) return 0;
  const UnitRange units = visible_units(params.attention, sequence);
  const int32_t per_entry = params.piece_units;
  const int32_t count = (units.end + per_entry - 1) / per_entry - units.begin / per_entry;
  return count > 0 ? count : 1;
}

constexpr int kPlanThreads = 256;
constexpr int kPlanSharedBytes = kPlanThreads / 32 * static_cast<int>(sizeof(int32_t));

// grid (1), block (kPlanThreads): plan [B + 1] = entries of the rows before each row.
__device__ __forceinline__ void make_plan(const KernelParams& params) {
  auto* warp_sums = reinterpret_cast<int32_t*>(dynamic_shared());  // [kPlanThreads / 32]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const auto rows = static_cast<int32_t>(params.attention.batch);
  int32_t before = 0;
  if (thread == 0) params.plan[0] = 0;
  for (int32_t first = 0; first < rows; first += kPlanThreads) {
    const int32_t row = first + thread;
    int32_t sum = row < rows ? plan_entries(params, load_sequence(params.attention, row)) : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    if (lane == 31) warp_sums[warp] = sum;
    // Sums of all warps are written before anybody adds them up.
    KV_OMITTABLE(plan_sum_barrier, __syncthreads());
    int32_t total = 0;
    for (int w = 0; w < kPlanThreads / 32; ++w) {
      if (w < warp) sum += warp_sums[w];
      total += warp_sums[w];
    }
    if (row < rows) params.plan[row + 1] = before + sum;
    before += total;
    // Sums are read before the next rows overwrite them.
    KV_OMITTABLE(plan_rows_barrier, __syncthreads());
  }
}

// Programs that have a share: no more than units, so that no slot of a cut row stays empty.
__host__ __device__ __forceinline__ int32_t sharing_programs(const KernelParams& params,
                                                             int32_t units) {
  const int32_t sharing = params.programs < units ? params.programs : units;
  return sharing > 1 ? sharing : 1;
}

// First entry of a program's share.
__device__ __forceinline__ int32_t share_begin(int32_t program, int32_t units, int32_t sharing) {
  const int64_t begin = static_cast<int64_t>(program) * units / sharing;
  return static_cast<int32_t>(begin < units ? begin : units);
}

// Workspace slots [begin, end) of a row; at most one if nobody cut it.
struct SlotRange {
  int32_t begin;
  int32_t end;
};

__host__ __device__ __forceinline__ SlotRange row_slots(const KernelParams& params, int32_t row) {
  const int32_t begin = params.plan[row], end = params.plan[row + 1];
  if (params.piece_units > 1 || begin == end) return {begin, end};
  const int32_t units = params.plan[params.attention.batch];
  const int64_t sharing = sharing_programs(params, units);
  // The program of unit u is the last one whose share begins at or before u.
  const auto first = static_cast<int32_t>(((begin + 1) * sharing - 1) / units);
  const auto last = static_cast<int32_t>((end * sharing - 1) / units);
  return {first + row, last + row + 1};
}

}  // namespace pykvcache::cuda
