// Which kernels serve a call: the one table that decides. The first line that serves it is taken.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/kernel_params.h"

namespace pykvcache::cuda {

#ifndef KV_LARGEST_HEAD_DIM
#define KV_LARGEST_HEAD_DIM 256  // a build for tests leaves the larger classes out
#endif
constexpr int kLargestHeadDim = KV_LARGEST_HEAD_DIM;

struct Capability {
  const char* name;
  int head_dim;         // class that it is compiled for; 0: any
  int64_t max_dim;      // of D and Dv
  bool float32;         // queries; float16 and bfloat16 are served by all
  bool other_cache;     // a cache dtype that is neither q's nor float8_e4m3fn
  bool channel_scales;  // scales of scalars, heads and slots are served by all
  int64_t alignment;    // bytes, of every row of q, K and V
};

constexpr Capability kCapabilities[] = {
    {"tensor cores, D 64", 64, 64, false, false, false, 16},
    {"tensor cores, D 128", 128, 128, false, false, false, 16},
    {"tensor cores, D 256", 256, 256, false, false, false, 16},
    {"plain", 0, kMaxHeadDim, true, true, true, 1},
};

// The largest power of two up to 16 that divides the address and the size of every row.
inline int64_t row_alignment(const AttentionParams& p) {
  uint64_t bits = 16;
  const auto add = [&](const void* data, int64_t bytes, int64_t elements) {
    bits |= reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(elements * bytes);
  };
  const int64_t q_bytes = bytes_of(p.q_dtype);
  add(p.q, q_bytes, p.head_dim | p.q_stride_token | p.q_stride_head);
  for (const CacheView& cache : {p.k, p.v})
    add(cache.data, bytes_of(cache.dtype),
        cache.stride_block | cache.stride_head | cache.stride_slot);
  add(nullptr, bytes_of(p.k.dtype), p.head_dim | p.v_head_dim);
  return static_cast<int64_t>(bits & (~bits + 1));
}

inline bool serves(const Capability& kernel, const AttentionParams& p, int64_t alignment) {
  const bool own_cache = p.k.dtype == p.q_dtype || p.k.dtype == DType::kFloat8E4M3;
  const bool channels =
      p.k_scale.kind == ScaleKind::kChannel || p.v_scale.kind == ScaleKind::kChannel;
  return p.head_dim <= kernel.max_dim && p.v_head_dim <= kernel.max_dim &&
         (kernel.float32 || p.q_dtype != DType::kFloat32) && (kernel.other_cache || own_cache) &&
         (kernel.channel_scales || !channels) && alignment >= kernel.alignment;
}

// What prefill with wgmma takes of the calls that tensor cores serve; mma.sync takes the rest.
constexpr int64_t kWgmmaStrideBytes = (int64_t{1} << 40) - 1;  // that a tensor map holds

inline bool wgmma_serves(const AttentionParams& p) {
  for (const CacheView& cache : {p.k, p.v})
    for (const int64_t stride : {cache.stride_block, cache.stride_head, cache.stride_slot})
      if (stride < 0 || stride * bytes_of(cache.dtype) > kWgmmaStrideBytes) return false;
  return p.k.dtype == p.q_dtype && p.k_scale.kind != ScaleKind::kSlot &&
         p.v_scale.kind != ScaleKind::kSlot && p.bias.data == nullptr;
}

// PYKVCACHE_CUDA_PREFILL: "mma" (the default) or "wgmma", where it can. Looked at in every call.
inline bool wgmma_is_wanted() {
  const char* value = std::getenv("PYKVCACHE_CUDA_PREFILL");
  const std::string wanted = value == nullptr || *value == '\0' ? "mma" : value;
  if (wanted != "mma" && wanted != "wgmma")
    throw std::invalid_argument("PYKVCACHE_CUDA_PREFILL must be mma or wgmma, got " + wanted);
  return wanted == "wgmma";
}

// `fits(kernel)` says whether the device has the memory that a kernel needs.
template <class Fits>
const Capability& choose_kernel(const AttentionParams& p, Fits&& fits) {
  const int64_t alignment = row_alignment(p);
  for (const Capability& kernel : kCapabilities)
    if (serves(kernel, p, alignment) && fits(kernel)) return kernel;
  std::string supported;
  for (const Capability& kernel : kCapabilities)
    supported += std::string(supported.empty() ? "" : "; ") + kernel.name + " (D and Dv up to " +
                 std::to_string(kernel.max_dim) + (kernel.float32 ? ", any dtype" : ", 2 bytes") +
                 ", rows aligned to " + std::to_string(kernel.alignment) + ")";
  throw std::invalid_argument("backend 'cuda' has no kernel for D " + std::to_string(p.head_dim) +
                              ", Dv " + std::to_string(p.v_head_dim) + ", q of " +
                              std::to_string(bytes_of(p.q_dtype)) + " bytes, cache of " +
                              std::to_string(bytes_of(p.k.dtype)) + " bytes, rows aligned to " +
                              std::to_string(alignment) + "; it has " + supported);
}

}  // namespace pykvcache::cuda
