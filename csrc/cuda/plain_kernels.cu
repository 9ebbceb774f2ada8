// Compiles what no head dim multiplies: plan, merges, and attention without tensor cores.
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/merge.cuh"
#include "cuda/plain.cuh"
#include "cuda/plan.cuh"

namespace pykvcache::cuda {
namespace {

__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const __grid_constant__ KernelParams params) {
  make_plan(params);
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_pieces_kernel(const __grid_constant__ KernelParams params) {
  merge_pieces<T>(params);
}

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states_kernel(const __grid_constant__ MergeStatesParams params) {
  merge_states<T>(params);
}

template <class KV>
__global__ void __launch_bounds__(Plain<KV>::kThreads, 4)
    plain_kernel(const __grid_constant__ KernelParams params) {
  Plain<KV>().run(params);
}

unsigned groups_of(int64_t count, int64_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace

void plan(const KernelParams& params, Stream stream) {
  launch(&plan_kernel, {1}, kPlanThreads, kPlanSharedBytes, stream, params);
}

void merge_pieces(const KernelParams& params, Stream stream) {
  const AttentionParams& p = params.attention;
  const dim3 grid{static_cast<unsigned>(merge_columns(params)),
                  static_cast<unsigned>(p.num_kv_heads * params.merged_rows)};
  if (grid.x == 0) return;  // one program cuts nothing
  dispatch_float(p.q_dtype, [&](auto type) {
    launch(&merge_pieces_kernel<typename decltype(type)::type>, grid, kMergeThreads,
           kMergeWarps * static_cast<int>(p.v_head_dim * sizeof(float)), stream, params);
  });
}

void merge_states(const MergeStatesParams& params, DType dtype, Stream stream) {
  dispatch_cache(dtype, [&](auto type) {
    launch(&merge_states_kernel<typename decltype(type)::type>,
           {groups_of(params.places, kMergeWarps)}, kMergeThreads, 0, stream, params);
  });
}

void attend_plainly(const KernelParams& params, Stream stream) {
  const AttentionParams& p = params.attention;
  const dim3 grid{static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(p.num_heads)};
  dispatch_cache(p.k.dtype, [&](auto type) {
    using Kernel = Plain<typename decltype(type)::type>;
    launch(&plain_kernel<typename decltype(type)::type>, grid, Kernel::kThreads,
           Kernel::kSharedBytes, stream, params);
  });
}

}  // namespace pykvcache::cuda
