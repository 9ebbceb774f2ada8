// Compiles prefill with wgmma for one class of head dims, KV_HEAD_DIM. On other architectures than
// sm_90a the kernel is a trap that no launcher reaches.
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma_prefill.cuh"

namespace pykvcache::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(WarpgroupPrefill<T, KV_HEAD_DIM>::kThreads, 1)
    wgmma_kernel([[maybe_unused]] const __grid_constant__ WarpgroupParams params) {
#if defined(KV_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  WarpgroupPrefill<T, KV_HEAD_DIM>().run(params);
#else
  __trap();
#endif
}

// function(Type<WarpgroupPrefill<...>>, kernel)
template <class Function>
auto with_kernel(const KernelParams& params, Function&& function) {
  const auto call = [&](auto q) {
    using T = typename decltype(q)::type;
    return function(Type<WarpgroupPrefill<T, KV_HEAD_DIM>>(), &wgmma_kernel<T>);
  };
  if (params.attention.q_dtype == DType::kFloat16) return call(Type<Half>());
  return call(Type<BFloat16>());
}

BoxLayout layout_of(const CacheView& cache, const AttentionParams& p, int64_t dim, int box_rows) {
  return {cache.data,
          {dim, p.block_size, p.num_kv_heads, cache.num_blocks},
          {2 * cache.stride_slot, 2 * cache.stride_head, 2 * cache.stride_block},
          box_rows};
}

// The most keys, a power of two, that divide a block and a tile; 0 if they are too few for boxes.
int32_t box_shift(int64_t block_size, int tile_keys) {
  int32_t shift = 0;
  while ((2 << shift) <= tile_keys && block_size % (2 << shift) == 0) ++shift;
  return (1 << shift) >= kSmallestBox ? shift : 0;
}

}  // namespace

template <>
bool HeadDim<KV_HEAD_DIM>::has_wgmma_prefill(const KernelParams& params) {
  if (params.attention.k.num_blocks == 0) return false;  // there is no memory to map
  return with_kernel(params, [](auto type, auto kernel) {
    return built_for_hopper(kernel) &&
           decltype(type)::type::kSharedBytes <= shared_bytes_of_device();
  });
}

template <>
KernelShape HeadDim<KV_HEAD_DIM>::wgmma_shape(const KernelParams& params) {
  return with_kernel(params, [](auto type, auto) {
    using Kernel = typename decltype(type)::type;
    return KernelShape{Kernel::Stages::kRows, Kernel::kTileKeys, Kernel::Stages::kStages,
                       Kernel::kThreads, Kernel::kSharedBytes};
  });
}

template <>
void HeadDim<KV_HEAD_DIM>::prefill_with_wgmma(const KernelParams& params, Stream stream) {
  const AttentionParams& p = params.attention;
  with_kernel(params, [&](auto type, auto kernel) {
    using Kernel = typename decltype(type)::type;
    WarpgroupParams all;
    all.kernel = params;
    all.box_shift = box_shift(p.block_size, Kernel::kTileKeys);
    if (all.box_shift > 0) {
      all.maps[0] = encode_map(layout_of(p.k, p, p.head_dim, 1 << all.box_shift));
      all.maps[1] = encode_map(layout_of(p.v, p, p.v_head_dim, 1 << all.box_shift));
    }
    const dim3 grid{static_cast<unsigned>(Kernel::Tiles::count(params)),
                    static_cast<unsigned>(p.num_kv_heads)};
    launch(kernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, all);
  });
}

}  // namespace pykvcache::cuda
