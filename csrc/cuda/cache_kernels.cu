// Compiles the kernels of the cache operators and chooses how wide they move.
#include <algorithm>

#include "cuda/cache_kernels.cuh"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"

namespace pykvcache::cuda {
namespace {

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads)
    write_rows_kernel(const __grid_constant__ WriteArguments arguments) {
  write_rows<Vector>(arguments);
}

template <class T>
__global__ void __launch_bounds__(32)
    write_scaled_kernel(const __grid_constant__ WriteArguments arguments) {
  write_scaled<T>(arguments);
}

template <class T>
__global__ void __launch_bounds__(32)
    fill_channel_scales_kernel(const __grid_constant__ WriteArguments arguments) {
  fill_channel_scales<T>(arguments);
}

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads)
    copy_blocks_kernel(const __grid_constant__ CopyParams params) {
  copy_blocks<Vector>(params);
}

template <class Vector>
__global__ void __launch_bounds__(kCopyThreads)
    gather_rows_kernel(const __grid_constant__ GatherParams params) {
  gather_rows<Vector>(params);
}

__global__ void __launch_bounds__(kCopyThreads)
    map_slots_kernel(const __grid_constant__ SlotMappingParams params) {
  map_slots(params);
}

// All bits that must be 0 for a vector of that many bytes: addresses and strides of a side.
class Alignment {
 public:
  void add(const void* pointer) { bits_ |= reinterpret_cast<uintptr_t>(pointer); }
  void add(int64_t bytes) { bits_ |= static_cast<uint64_t>(bytes); }
  void add(const CacheView& cache, int64_t bytes) {
    add(cache.data);
    add(cache.head_dim * bytes);
    add(cache.stride_block * bytes);
    add(cache.stride_head * bytes);
    add(cache.stride_slot * bytes);
  }

  // function(Type<Vector>)
  template <class Function>
  void dispatch(Function&& function) const {
    if (bits_ % 16 == 0) return function(Type<uint4>());
    if (bits_ % 4 == 0) return function(Type<uint32_t>());
    function(Type<uint8_t>());
  }

 private:
  uint64_t bits_ = 0;
};

int threads_for(int64_t vectors) {
  return static_cast<int>(std::clamp<int64_t>((vectors + 31) / 32 * 32, 32, kCopyThreads));
}

int64_t vectors_of_token(const CacheView* caches, int sides, int64_t heads, int64_t vector_bytes) {
  const int64_t dim = std::max(caches[0].head_dim, sides > 1 ? caches[1].head_dim : 0);
  return heads * dim * bytes_of(caches[0].dtype) / vector_bytes;
}

}  // namespace

void write(const WriteArguments& w, Stream stream) {
  if (w.num_tokens == 0 || w.num_heads == 0) return;
  const auto tokens = static_cast<unsigned>(w.num_tokens), sides = static_cast<unsigned>(w.sides);
  bool plain = true, channels = false;
  Alignment alignment;
  for (int side = 0; side < w.sides; ++side) {
    const int64_t bytes = bytes_of(w.tokens[side].dtype);
    plain &=
        w.scales[side].kind == ScaleKind::kNone && w.caches[side].dtype == w.tokens[side].dtype;
    channels |= w.scales[side].kind == ScaleKind::kChannel;
    alignment.add(w.caches[side], bytes);
    alignment.add(w.tokens[side].data);
    alignment.add(w.tokens[side].stride_token * bytes);
    alignment.add(w.tokens[side].stride_head * bytes);
  }
  if (plain)
    return alignment.dispatch([&](auto type) {
      using Vector = typename decltype(type)::type;
      const int64_t vectors = vectors_of_token(w.caches, w.sides, w.num_heads, sizeof(Vector));
      launch(&write_rows_kernel<Vector>, {tokens, sides}, threads_for(vectors), 0, stream, w);
    });
  dispatch_float(w.tokens[0].dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 grid{tokens, static_cast<unsigned>(w.num_heads), sides};
    if (channels) launch(&fill_channel_scales_kernel<T>, grid, 32, 0, stream, w);
    launch(&write_scaled_kernel<T>, grid, 32, 0, stream, w);
  });
}

void copy_blocks(const CopyParams& params, int64_t pairs, Stream stream) {
  Alignment alignment;
  alignment.add(params.from);
  alignment.add(params.to);
  alignment.add(params.from_stride | params.to_stride | params.block_bytes);
  alignment.dispatch([&](auto type) {
    using Vector = typename decltype(type)::type;
    const int64_t vectors = params.block_bytes / static_cast<int64_t>(sizeof(Vector));
    const auto pieces = std::clamp<int64_t>(vectors / (4 * kCopyThreads), 1, 64);
    launch(&copy_blocks_kernel<Vector>,
           {static_cast<unsigned>(pairs), static_cast<unsigned>(pieces)}, threads_for(vectors), 0,
           stream, params);
  });
}

void gather(const GatherParams& params, int sides, Stream stream) {
  Alignment alignment;
  for (int side = 0; side < sides; ++side) {
    alignment.add(params.caches[side], bytes_of(params.caches[side].dtype));
    alignment.add(params.dense[side]);
  }
  alignment.dispatch([&](auto type) {
    using Vector = typename decltype(type)::type;
    const int64_t vectors =
        vectors_of_token(params.caches, sides, params.num_heads, sizeof(Vector));
    launch(&gather_rows_kernel<Vector>,
           {static_cast<unsigned>(params.total), static_cast<unsigned>(sides)},
           threads_for(vectors), 0, stream, params);
  });
}

void map_slots(const SlotMappingParams& params, Stream stream) {
  const auto groups = static_cast<unsigned>((params.num_tokens + kCopyThreads - 1) / kCopyThreads);
  launch(&map_slots_kernel, {groups}, kCopyThreads, 0, stream, params);
}

}  // namespace pykvcache::cuda
