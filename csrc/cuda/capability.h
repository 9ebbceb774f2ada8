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

enum class Phase { kDecode, kPrefill };

// What a kernel takes. float16 and bfloat16 queries over a cache of their dtype, windows, chunks,
// softcap, sinks, ALiBi, holes and scales of scalars and heads are served by all.
struct Capability {
  const char* name;
  int head_dim;         // class that it is compiled for; 0: any
  int64_t max_dim;      // of D and Dv
  int64_t alignment;    // bytes, of every row of q, K and V
  bool wgmma;           // prefill alone, on Hopper GPUs; strides as a tensor map holds them
  bool float32;         // queries
  bool float8;          // float8_e4m3fn caches
  bool other_cache;     // any other cache dtype that is not q's
  bool slot_scales;     // scales of slots
  bool channel_scales;  // scales of channels
  bool bias;
};

constexpr Capability wgmma(const char* name, int dim) {
  return {name, dim, dim, 16, true, false, false, false, false, false, false};
}
constexpr Capability tensor_cores(const char* name, int dim) {
  return {name, dim, dim, 16, false, false, true, false, true, false, true};
}
constexpr Capability kCapabilities[] = {
    wgmma("wgmma, D 64", 64),
    wgmma("wgmma, D 128", 128),
    wgmma("wgmma, D 256", 256),
    tensor_cores("tensor cores, D 64", 64),
    tensor_cores("tensor cores, D 128", 128),
    tensor_cores("tensor cores, D 256", 256),
    {"plain", 0, kMaxHeadDim, 1, false, true, true, true, true, true, true},
};
constexpr int64_t kTensorMapStride = (int64_t{1} << 40) - 1;  // bytes, the largest it holds

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

inline bool has_scales(const AttentionParams& p, ScaleKind kind) {
  return p.k_scale.kind == kind || p.v_scale.kind == kind;
}

inline bool fits_tensor_maps(const AttentionParams& p) {
  for (const CacheView& cache : {p.k, p.v})
    for (const int64_t stride : {cache.stride_block, cache.stride_head, cache.stride_slot})
      if (stride < 0 || stride * bytes_of(cache.dtype) > kTensorMapStride) return false;
  return true;
}

inline bool serves(const Capability& kernel, const AttentionParams& p, Phase phase,
                   int64_t alignment) {
  const bool float8 = p.k.dtype == DType::kFloat8E4M3;
  const auto is_taken = [](bool wanted, bool taken) { return !wanted || taken; };
  return p.head_dim <= kernel.max_dim && p.v_head_dim <= kernel.max_dim &&
         alignment >= kernel.alignment &&
         is_taken(kernel.wgmma, phase == Phase::kPrefill && fits_tensor_maps(p)) &&
         is_taken(p.q_dtype == DType::kFloat32, kernel.float32) &&
         is_taken(float8, kernel.float8) &&
         is_taken(!float8 && p.k.dtype != p.q_dtype, kernel.other_cache) &&
         is_taken(has_scales(p, ScaleKind::kSlot), kernel.slot_scales) &&
         is_taken(has_scales(p, ScaleKind::kChannel), kernel.channel_scales) &&
         is_taken(p.bias.data != nullptr, kernel.bias);
}

// PYKVCACHE_CUDA_PREFILL: "mma" (the default) or "wgmma", where it can. Looked at in every call.
inline bool wgmma_is_wanted() {
  const char* value = std::getenv("PYKVCACHE_CUDA_PREFILL");
  const std::string wanted = value == nullptr || *value == '\0' ? "mma" : value;
  if (wanted != "mma" && wanted != "wgmma")
    throw std::invalid_argument("PYKVCACHE_CUDA_PREFILL must be mma or wgmma, got " + wanted);
  return wanted == "wgmma";
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    case DType::kBool:
      return "bool";
  }
  return "another dtype";
}

inline std::string description(const Capability& kernel) {
  std::string text = std::string(kernel.name) + " (D and Dv up to " +
                     std::to_string(kernel.max_dim) + ", rows aligned to " +
                     std::to_string(kernel.alignment) + " bytes, float16, bfloat16";
  const auto add = [&](bool taken, const char* what) {
    if (taken) text += std::string(", ") + what;
  };
  add(kernel.float32, "float32");
  add(kernel.float8, "float8_e4m3fn caches");
  add(kernel.other_cache, "any other cache");
  add(kernel.slot_scales, "scales of slots");
  add(kernel.channel_scales, "scales of channels");
  add(kernel.bias, "bias");
  return text + (kernel.wgmma ? "; prefill on Hopper)" : ")");
}

// `fits(kernel)` says whether the device has what a kernel needs.
template <class Fits>
const Capability& choose_kernel(const AttentionParams& p, Phase phase, Fits&& fits) {
  const int64_t alignment = row_alignment(p);
  for (const Capability& kernel : kCapabilities)
    if (serves(kernel, p, phase, alignment) && fits(kernel)) return kernel;
  std::string wanted = "D " + std::to_string(p.head_dim) + ", Dv " + std::to_string(p.v_head_dim) +
                       ", q " + name_of(p.q_dtype) + ", cache " + name_of(p.k.dtype) +
                       ", rows aligned to " + std::to_string(alignment) + " bytes";
  if (has_scales(p, ScaleKind::kSlot)) wanted += ", scales of slots";
  if (has_scales(p, ScaleKind::kChannel)) wanted += ", scales of channels";
  if (p.bias.data != nullptr) wanted += ", bias";
  std::string supported;
  for (const Capability& kernel : kCapabilities)
    supported += (supported.empty() ? "" : "; ") + description(kernel);
  throw std::invalid_argument("backend 'cuda' has no kernel for " + wanted + "; it has " +
                              supported);
}

}  // namespace pykvcache::cuda
