// The contract between the torch-facing launchers and the kernels: plain data, shapes in comments.
// No torch and no Python header may be included here or in any kernel file.
// Read next: csrc/cpu/kernels/.
#pragma once

#include <cstdint>

namespace pykvcache {

constexpr int64_t kMaxHeadDim = 576;  // of q and K, and of the output

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kBool };

// One side (K or V) of the block pool: [num_blocks, HKV, block_size, D], last dim contiguous.
struct CacheView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t num_blocks = 0;
  int64_t head_dim = 0;
  int64_t stride_block = 0;  // strides in elements
  int64_t stride_head = 0;
  int64_t stride_slot = 0;
};

// New keys or values: [T, HKV, D], last dim contiguous.
struct TokenView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_token = 0;
  int64_t stride_head = 0;
};

// Dequantisation scales: [], [HKV], [num_blocks, HKV, block_size] or [num_blocks, HKV, D].
enum class ScaleKind : int32_t { kNone, kScalar, kHead, kSlot, kChannel };
struct ScaleView {
  float* data = nullptr;
  ScaleKind kind = ScaleKind::kNone;
  int64_t stride_block = 0;
  int64_t stride_head = 0;
};

// What write_kv writes: K, or K and V.
struct WriteArguments {
  int32_t sides = 1;
  TokenView tokens[2];
  CacheView caches[2];
  ScaleView scales[2];
  const int64_t* slots = nullptr;  // [T]; negative: skipped
  int64_t num_tokens = 0;
  int64_t num_heads = 0;  // HKV
  int64_t block_size = 0;
  int64_t num_slots = 0;
};

// An additive (float) or keep (bool) mask, broadcast to [B, HQ, max_q, max_kv] by zero strides.
struct BiasView {
  const void* data = nullptr;  // may be nullptr
  DType dtype = DType::kFloat32;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_query = 0;
  int64_t stride_key = 0;
};

// Choices that change how fast a kernel runs; 0 = the kernel's own. See cpu/launches.h.
struct Launch {
  int64_t tile = 0;    // decode: tokens of a tile
  int64_t stages = 0;  // decode: steps that prefetching runs ahead
  int64_t splits = 0;  // decode: items that a thread is given at first, where rows are cut
  int64_t rows = 0;    // general kernel: query rows that pass over the keys together
};

struct AttentionParams {
  const void* q = nullptr;  // [T, HQ, D]
  int64_t q_stride_token = 0;
  int64_t q_stride_head = 0;
  DType q_dtype = DType::kFloat32;
  CacheView k;
  CacheView v;
  const int32_t* block_table = nullptr;  // [B, max_blocks], -1 = hole or unused
  int64_t block_table_stride = 0;
  const int32_t* seq_lens = nullptr;      // [B], KV length including this step's tokens
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]
  const float* sinks = nullptr;           // [HQ], may be nullptr
  const float* alibi_slopes = nullptr;    // [HQ], may be nullptr
  BiasView bias;
  ScaleView k_scale;
  ScaleView v_scale;
  void* out = nullptr;   // [T, HQ, Dv], contiguous, dtype of q
  float* lse = nullptr;  // [T, HQ], contiguous, natural log
  int64_t batch = 0;
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t block_size = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0 = none
  bool causal = true;
  int64_t window = 0;  // 0 = none; counts the current token
  int64_t chunk = 0;   // 0 = none
  bool deterministic = false;
  Launch launch;
};

}  // namespace pykvcache
