// What a launch of the attention kernels knows: csrc/params.h plus what the host has prepared for
// the device. Plain data, passed by value. Read next: paged_kv.cuh.
#pragma once

#include "cuda/divisor.h"
#include "params.h"

namespace pykvcache::cuda {

constexpr int kUnit = 64;        // keys of a unit of the plan
constexpr int kFixedUnits = 16;  // units of a piece when deterministic: 1,024 keys
constexpr int kRowTile = 16;     // query rows of an MMA
constexpr int kMaxPlainDim = static_cast<int>(kMaxHeadDim);

__host__ __device__ __forceinline__ int64_t bytes_of(DType dtype) {
  if (dtype == DType::kFloat32) return 4;
  return dtype == DType::kFloat8E4M3 || dtype == DType::kBool ? 1 : 2;
}

struct SoftmaxState;

struct KernelParams {
  AttentionParams attention;
  Divisor block_size;
  Divisor group;  // query heads per KV head
  // Query rows, tokens times group, of the longest sequence that decode takes; a multiple of 16.
  int32_t decode_rows = 0;
  int32_t merged_rows = 0;       // the same, of those in this call: the room of a slot
  int32_t programs = 0;          // persistent decode CTAs per KV head and row tile
  int32_t piece_units = 1;       // units of the plan's entries: 1, or kFixedUnits
  int32_t* plan = nullptr;       // [B + 1], pieces or units before each row
  float* part_values = nullptr;  // [slots, HKV, merged_rows, Dv], not normalised
  // [slots, HKV, merged_rows]. Not log-sum-exps: beside a bias of -1e9 they have no room for a sum.
  SoftmaxState* part_states = nullptr;
};

// Row tiles that decode is launched for.
__host__ __device__ __forceinline__ int32_t row_tiles(const KernelParams& params) {
  return (params.merged_rows + kRowTile - 1) / kRowTile;
}

}  // namespace pykvcache::cuda
