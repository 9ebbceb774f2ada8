// Compiles decode for one class of head dims, KV_HEAD_DIM.
#include "cuda/decode.cuh"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"

namespace pykvcache::cuda {
namespace {

template <class T, class KV, int kStages>
__global__ void __launch_bounds__(Decode<T, KV, KV_HEAD_DIM, kStages>::kThreads,
                                  Decode<T, KV, KV_HEAD_DIM, kStages>::kResidentCtas)
    decode_kernel(const __grid_constant__ KernelParams params) {
  Decode<T, KV, KV_HEAD_DIM, kStages>().run(params);
}

// function(kernel, shape)
template <class Function>
auto with_kernel(const KernelParams& params, Function&& function) {
  return dispatch_tensor_cores(params.attention, [&](auto q, auto kv) {
    using T = typename decltype(q)::type;
    using KV = typename decltype(kv)::type;
    const auto with_stages = [&](auto stages) {
      using Kernel = Decode<T, KV, KV_HEAD_DIM, stages>;
      return function(
          &decode_kernel<T, KV, stages>,
          KernelShape{kRowTile, Kernel::kStep, stages, Kernel::kThreads, Kernel::kSharedBytes});
    };
    using Usual = std::integral_constant<int, kUsualStages<KV>>;
    if constexpr (KV_HEAD_DIM == 256 && sizeof(KV) == 2)  // compute capability 8.6, 8.9, 12.0
      if (shared_bytes_of_device() < Decode<T, KV, KV_HEAD_DIM>::kSharedBytes)
        return with_stages(std::integral_constant<int, 2>());
    return with_stages(Usual());
  });
}

}  // namespace

template <>
KernelShape HeadDim<KV_HEAD_DIM>::decode_shape(const KernelParams& params) {
  return with_kernel(params, [](auto, const KernelShape& shape) { return shape; });
}

template <>
int HeadDim<KV_HEAD_DIM>::resident_decode_ctas(const KernelParams& params) {
  return with_kernel(params, [](auto kernel, const KernelShape& shape) {
    return resident_ctas(kernel, shape.threads, shape.shared_bytes);
  });
}

template <>
void HeadDim<KV_HEAD_DIM>::decode(const KernelParams& params, Stream stream) {
  const dim3 grid{static_cast<unsigned>(params.programs),
                  static_cast<unsigned>(params.attention.num_kv_heads * row_tiles(params))};
  with_kernel(params, [&](auto kernel, const KernelShape& shape) {
    launch(kernel, grid, shape.threads, shape.shared_bytes, stream, params);
  });
}

}  // namespace pykvcache::cuda
