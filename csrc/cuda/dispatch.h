// From dtypes at run time to types at compile time.
#pragma once

#include <stdexcept>

#include "cuda/ptx.cuh"
#include "params.h"

namespace pykvcache::cuda {

template <class T>
struct Type {
  using type = T;
};

// function(Type<T>) with T = float, Half or BFloat16.
template <class Function>
auto dispatch_float(DType dtype, Function&& function) {
  if (dtype == DType::kFloat16) return function(Type<Half>());
  if (dtype == DType::kBFloat16) return function(Type<BFloat16>());
  return function(Type<float>());
}

// function(Type<KV>) with any dtype of a cache.
template <class Function>
auto dispatch_cache(DType dtype, Function&& function) {
  if (dtype == DType::kFloat8E4M3) return function(Type<Float8>());
  return dispatch_float(dtype, function);
}

// function(Type<T>, Type<KV>) for what tensor cores multiply: KV and q are T, or KV is Float8, T is
// Half, and q is either.
template <class Function>
auto dispatch_tensor_cores(const AttentionParams& p, Function&& function) {
  if (p.k.dtype == DType::kFloat8E4M3) return function(Type<Half>(), Type<Float8>());
  if (p.q_dtype == DType::kFloat16) return function(Type<Half>(), Type<Half>());
  return function(Type<BFloat16>(), Type<BFloat16>());
}

}  // namespace pykvcache::cuda
