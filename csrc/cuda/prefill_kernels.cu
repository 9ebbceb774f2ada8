// Compiles prefill for one class of head dims, KV_HEAD_DIM.
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/prefill.cuh"

namespace pykvcache::cuda {
namespace {

template <class T, class KV>
__global__ void __launch_bounds__(Prefill<T, KV, KV_HEAD_DIM>::kThreads)
    prefill_kernel(const __grid_constant__ KernelParams params) {
  Prefill<T, KV, KV_HEAD_DIM>().run(params);
}

// function(Type<Prefill<...>>, kernel)
template <class Function>
auto with_kernel(const KernelParams& params, Function&& function) {
  return dispatch_tensor_cores(params.attention, [&](auto q, auto kv) {
    using T = typename decltype(q)::type;
    using KV = typename decltype(kv)::type;
    return function(Type<Prefill<T, KV, KV_HEAD_DIM>>(), &prefill_kernel<T, KV>);
  });
}

}  // namespace

template <>
KernelShape HeadDim<KV_HEAD_DIM>::prefill_shape(const KernelParams& params) {
  return with_kernel(params, [](auto type, auto) {
    using Kernel = typename decltype(type)::type;
    return KernelShape{Kernel::kRows, Kernel::kTileKeys, Kernel::kStages, Kernel::kThreads,
                       Kernel::kSharedBytes};
  });
}

template <>
void HeadDim<KV_HEAD_DIM>::prefill(const KernelParams& params, Stream stream) {
  with_kernel(params, [&](auto type, auto kernel) {
    using Kernel = typename decltype(type)::type;
    const dim3 grid{static_cast<unsigned>(Kernel::Tiles::count(params)),
                    static_cast<unsigned>(params.attention.num_kv_heads)};
    launch(kernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, params);
  });
}

}  // namespace pykvcache::cuda
