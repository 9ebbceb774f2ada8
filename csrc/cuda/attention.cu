// Launchers of paged_attention and plan: check, sizes, device, allocate, fill params, launch.
// Nothing here waits for the GPU.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "attention_arguments.h"
#include "cuda/schedule.h"
#include "cuda/softmax_state.cuh"
#include "cuda/torch_device.h"

namespace pykvcache::cuda {
namespace {

Tensor workspace(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, {count}, std::make_optional(dtype));
}

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const std::optional<Tensor>& v_cache,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
    int64_t max_seqlen_q, double scale, bool causal, int64_t window, int64_t chunk, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t v_head_dim, const std::optional<Tensor>& plan,
    bool deterministic) {
  AttentionParams p =
      attention_arguments(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q,
                          scale, causal, window, chunk, softcap, sinks, alibi_slopes, bias, k_scale,
                          v_scale, v_head_dim, deterministic, place_of(k_cache));
  const OnDevice device(k_cache);
  Tensor out = torch::stable::new_empty(q, {p.num_tokens, p.num_heads, p.v_head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.num_tokens, p.num_heads},
                                        std::make_optional(ScalarType::Float));
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (p.num_tokens == 0) return {out, lse};

  Schedule s = make_schedule(p, max_seqlen_q, block_table.size(1));
  std::optional<Tensor> own_plan, part_values, part_states;
  const bool has_plan = plan && plan->numel() == p.batch + 1;
  if (s.decodes) {
    if (has_plan) {
      check_place(*plan, "plan", place_of(k_cache));
      check_dtype(*plan, "plan", ScalarType::Int);
      check_last_dim_contiguous(*plan, "plan");
    } else {
      own_plan = workspace(q, p.batch + 1, ScalarType::Int);
    }
    part_values = workspace(q, s.part_values_count(), ScalarType::Float);
    constexpr int64_t kFloats = sizeof(SoftmaxState) / sizeof(float);
    part_states = workspace(q, s.part_states_count() * kFloats, ScalarType::Float);
    // A given plan is only read.
    s.params.plan = has_plan ? static_cast<int32_t*>(const_cast<void*>(plan->const_data_ptr()))
                             : static_cast<int32_t*>(own_plan->mutable_data_ptr());
    s.params.part_values = static_cast<float*>(part_values->mutable_data_ptr());
    s.params.part_states = static_cast<SoftmaxState*>(part_states->mutable_data_ptr());
  }
  run(s, has_plan, device.stream());
  return {out, lse};
}

Tensor make_plan(const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q,
                 int64_t num_heads, int64_t num_kv_heads, int64_t, int64_t window, int64_t chunk,
                 bool deterministic) {
  const Place place = place_of(seq_lens);
  Dim B("B");
  AttentionParams p;
  p.seq_lens = int32_data(seq_lens, "seq_lens", {&B}, place);
  Dim starts("B + 1", B + 1);
  p.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", {&starts}, place);
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0)
    fail("num_heads must be a multiple of num_kv_heads: got ", num_heads, " and ", num_kv_heads);
  if (window < 0) fail("window must not be negative, got ", window);
  if (chunk < 0) fail("chunk must not be negative, got ", chunk);
  p.batch = B;
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.block_size = 1;
  p.window = window;
  p.chunk = chunk;
  p.deterministic = deterministic;
  const OnDevice device(seq_lens);
  Tensor made = workspace(seq_lens, B + 1, ScalarType::Int);
  KernelParams params = kernel_params(p, max_seqlen_q);
  params.plan = static_cast<int32_t*>(made.mutable_data_ptr());
  plan(params, device.stream());
  return made;
}

}  // namespace
}  // namespace pykvcache::cuda

STABLE_TORCH_LIBRARY_IMPL(pykvcache_cuda, KV_CUDA_DISPATCH_KEY, m) {
  KV_IMPL(m, "paged_attention", pykvcache::cuda::paged_attention);
  KV_IMPL(m, "plan", pykvcache::cuda::make_plan);
}
