#include <algorithm>
#include <numeric>

#include "cuda/explain.h"
#include "cuda/plain.cuh"
#include "cuda/plan.cuh"
#include "cuda/schedule.h"

namespace pykvcache::cuda {
namespace {

CacheView cache_of(DType dtype, int64_t heads, int64_t dim, int64_t block_size) {
  CacheView view;
  view.dtype = dtype;
  view.num_blocks = 1;
  view.head_dim = view.stride_slot = dim;
  view.stride_head = block_size * dim;
  view.stride_block = heads * block_size * dim;
  return view;
}

// The plan that make_plan() leaves on the device, for sequences without window or chunk.
std::vector<int32_t> plan_of(const KernelParams& params, std::span<const int64_t> seq_lens,
                             std::span<const int64_t> query_lens) {
  const int64_t entry_keys = int64_t{kUnit} * params.piece_units;
  std::vector<int32_t> plan(1, 0);
  for (size_t row = 0; row < seq_lens.size(); ++row) {
    const bool taken =
        query_lens[row] > 0 && query_lens[row] * params.group.divisor <= params.decode_rows;
    const int64_t entries = std::max<int64_t>(1, (seq_lens[row] + entry_keys - 1) / entry_keys);
    plan.push_back(plan.back() + (taken ? static_cast<int32_t>(entries) : 0));
  }
  return plan;
}

LaunchReport explain_decode(const Schedule& s, const KernelShape& shape,
                            std::span<const int64_t> seq_lens,
                            std::span<const int64_t> query_lens) {
  std::vector<int32_t> plan = plan_of(s.params, seq_lens, query_lens);
  KernelParams params = s.params;
  params.plan = plan.data();
  LaunchReport report{.kernel = "decode", .shape = shape};
  const int64_t programs = params.piece_units > 1 ? std::min(params.programs, plan.back())
                                                  : sharing_programs(params, plan.back());
  report.ctas = programs * params.attention.num_kv_heads * row_tiles(params);
  for (size_t row = 0; row < seq_lens.size(); ++row) {
    const SlotRange slots = row_slots(params, static_cast<int32_t>(row));
    const int64_t pieces = slots.end - slots.begin;
    report.cut_rows += pieces > 1;
    report.most_splits = std::max(report.most_splits, pieces);
  }
  return report;
}

LaunchReport explain_prefill(const Schedule& s, const KernelShape& shape,
                             std::span<const int64_t> query_lens) {
  LaunchReport report{.kernel = s.prefills_with_wgmma ? "wgmma_prefill" : "prefill",
                      .shape = shape};
  for (const int64_t queries : query_lens) {
    const int64_t rows = queries * s.params.group.divisor;
    if (rows > s.params.decode_rows) report.ctas += (rows + shape.rows - 1) / shape.rows;
  }
  report.ctas *= s.params.attention.num_kv_heads;
  return report;
}

}  // namespace

std::vector<LaunchReport> explain_launch(DType q, DType cache, int64_t heads, int64_t kv_heads,
                                         int64_t head_dim, int64_t block_size,
                                         std::span<const int64_t> seq_lens,
                                         std::span<const int64_t> query_lens) {
  AttentionParams p;
  p.q_dtype = q;
  p.k = p.v = cache_of(cache, kv_heads, head_dim, block_size);
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = p.v_head_dim = p.q_stride_head = head_dim;
  p.q_stride_token = heads * head_dim;
  p.block_size = block_size;
  p.batch = static_cast<int64_t>(seq_lens.size());
  p.num_tokens = std::accumulate(query_lens.begin(), query_lens.end(), int64_t{0});
  if (p.num_tokens == 0) return {};
  const int64_t longest_query = *std::max_element(query_lens.begin(), query_lens.end());
  const int64_t longest = *std::max_element(seq_lens.begin(), seq_lens.end());
  const Schedule s = make_schedule(p, longest_query, (longest + block_size - 1) / block_size);
  if (s.head_dim == 0)
    return {{.kernel = "plain",
             .shape = {.rows = 1, .threads = Plain<float>::kThreads},
             .ctas = p.num_tokens * heads}};
  return dispatch_head_dim(s.head_dim, [&](auto dim) {
    std::vector<LaunchReport> found;
    if (s.decodes)
      found.push_back(explain_decode(s, dim.decode_shape(s.params), seq_lens, query_lens));
    if (s.prefills)
      found.push_back(explain_prefill(
          s, s.prefills_with_wgmma ? dim.wgmma_shape(s.params) : dim.prefill_shape(s.params),
          query_lens));
    return found;
  });
}

}  // namespace pykvcache::cuda
