// From checked tensors to the plain views that kernels take. Torch-facing; included by launchers
// of every device.
#pragma once

#include <optional>

#include "check.h"
#include "params.h"

namespace pykvcache {

// Last dimension of a contiguous run; a pool must have 4 dims and be contiguous in the last.
inline CacheView cache_view(const Tensor& cache, const char* name, Dim* num_blocks, Dim* heads,
                            Dim* block_size, Dim* head_dim, const Place& place) {
  check_place(cache, name, place);
  check_shape(cache, name, {num_blocks, heads, block_size, head_dim});
  check_last_dim_contiguous(cache, name);
  if (*block_size < 1) fail("block_size must be at least 1, got ", *block_size);
  constexpr const char* kDtypes = "float32, float16, bfloat16 or float8_e4m3fn";
  CacheView view;
  view.data = cache.mutable_data_ptr();
  view.dtype = to_dtype(cache, name, kDtypes);
  if (view.dtype == DType::kBool) fail(name, " must be ", kDtypes, ", got bool");
  view.num_blocks = cache.size(0);
  view.head_dim = cache.size(3);
  view.stride_block = cache.stride(0);
  view.stride_head = cache.stride(1);
  view.stride_slot = cache.stride(2);
  return view;
}

inline ScaleView scale_view(const std::optional<Tensor>& scale, const char* name,
                            const CacheView& cache, int64_t heads, int64_t block_size,
                            const Place& place) {
  ScaleView view;
  if (!scale) return view;
  check_place(*scale, name, place);
  check_dtype(*scale, name, ScalarType::Float);
  const auto is = [&](std::initializer_list<int64_t> shape) {
    if (scale->dim() != static_cast<int64_t>(shape.size())) return false;
    int64_t i = 0;
    for (int64_t size : shape)
      if (scale->size(i++) != size) return false;
    return true;
  };
  if (is({})) {
    view.kind = ScaleKind::kScalar;
  } else if (is({heads})) {
    view.kind = ScaleKind::kHead;
    view.stride_head = scale->stride(0);
  } else if (is({cache.num_blocks, heads, block_size}) ||
             is({cache.num_blocks, heads, cache.head_dim})) {
    const bool per_slot = scale->size(2) == block_size;
    view.kind = per_slot ? ScaleKind::kSlot : ScaleKind::kChannel;
    view.stride_block = scale->stride(0);
    view.stride_head = scale->stride(1);
    check_last_dim_contiguous(*scale, name);
    if (cache.dtype != DType::kFloat8E4M3) fail(name, " per block needs a float8_e4m3fn cache");
  } else {
    const std::string blocks = std::to_string(cache.num_blocks) + ", " + std::to_string(heads);
    fail(name, " must have shape [], [", heads, "], [", blocks, ", ", block_size, "] or [", blocks,
         ", ", cache.head_dim, "], got ", shape_of(*scale));
  }
  view.data = static_cast<float*>(scale->mutable_data_ptr());
  return view;
}

inline TokenView token_view(const Tensor& x, const char* name, Dim* tokens, Dim* heads,
                            Dim* head_dim, const Place& place) {
  check_place(x, name, place);
  check_shape(x, name, {tokens, heads, head_dim});
  check_last_dim_contiguous(x, name);
  check_float(x, name);
  return {x.const_data_ptr(), to_dtype(x, name), x.stride(0), x.stride(1)};
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace pykvcache
