// Launcher of paged_attention: check, sizes, allocate, fill params, partition, run on torch's
// threads. Nothing is written before everything is checked. The kernels are in kernels/.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/launches.h"
#include "cpu/partition.h"
#include "cpu/thread_buffer.h"
#include "registration.h"

namespace pykvcache {
namespace {

constexpr Place kCpu{"cpu"};

}  // namespace

void check_rows(const AttentionParams& p, int64_t max_blocks, int64_t max_seqlen_q) {
  check_row_values(p, max_blocks, max_seqlen_q);
}

void attend(const AttentionParams& given) {
  AttentionParams p = given;
  p.launch = choose_launch(given);
  thread_local Partition partition;
  thread_local ThreadBuffer partial_buffer;
  const KernelTable& table = kernels();
  partition.cut(p, torch::stable::get_num_threads(), table.prefill_query_tile(p));
  const std::vector<WorkItem>& items = partition.items();
  const std::vector<Merge>& merges = partition.merges();
  auto* partials = static_cast<float*>(
      partial_buffer.at_least(partition.partial_floats() * static_cast<int64_t>(sizeof(float))));
  int64_t scratch_bytes = table.decode_scratch_bytes(p);
  if (partition.has_general_items())
    scratch_bytes = std::max(scratch_bytes, table.prefill_scratch_bytes(p));
  const auto unfinished = std::make_unique<std::atomic<int64_t>[]>(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) unfinished[i] = merges[i].num_splits;

  const auto states_of = [&](const Merge& merge) {
    return reinterpret_cast<PartialState*>(partials + merge.states_offset);
  };
  const auto run_item = [&](const WorkItem& item, void* scratch) {
    AttentionItem part = item.part;
    const Merge* merge = item.merge < 0 ? nullptr : &merges[item.merge];
    if (merge != nullptr) {
      const int64_t row = part.row;
      const int64_t places = (p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row]) * p.num_heads;
      part.partial_out = partials + merge->out_offset + item.split * places * p.v_head_dim;
      part.partial_states = states_of(*merge) + item.split * places;
    }
    (item.decode ? table.decode : table.prefill)(p, part, scratch);
    if (merge != nullptr && unfinished[item.merge].fetch_sub(1) == 1)
      table.merge_splits(p, merge->whole, partials + merge->out_offset, states_of(*merge),
                         merge->num_splits);
  };

  std::atomic<size_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    thread_local ThreadBuffer scratch_buffer;
    void* scratch = scratch_buffer.at_least(scratch_bytes);
    for (size_t i = next++; i < items.size(); i = next++) run_item(items[i], scratch);
  };
  if (partition.num_threads() <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, partition.num_threads(), 1, work);
}

LaunchReport explain_launch(DType dtype, int64_t heads, int64_t kv_heads, int64_t head_dim,
                            int64_t block_size, std::span<const int64_t> seq_lens,
                            std::span<const int64_t> query_lens) {
  const std::vector<int32_t> lengths(seq_lens.begin(), seq_lens.end());
  std::vector<int32_t> starts(1, 0);
  for (const int64_t count : query_lens) starts.push_back(starts.back() + static_cast<int>(count));
  AttentionParams p;
  p.q_dtype = p.k.dtype = p.v.dtype = dtype;
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = p.v_head_dim = head_dim;
  p.block_size = block_size;
  p.k.stride_slot = p.v.stride_slot = head_dim;
  p.batch = static_cast<int64_t>(lengths.size());
  p.num_tokens = starts.back();
  p.seq_lens = lengths.data();
  p.cu_seqlens_q = starts.data();
  p.launch = choose_launch(p);
  const KernelTable& table = kernels();
  Partition partition;
  partition.cut(p, torch::stable::get_num_threads(), table.prefill_query_tile(p));
  LaunchReport report{};
  report.threads = partition.num_threads();
  report.items = static_cast<int64_t>(partition.items().size());
  for (const WorkItem& item : partition.items()) report.decode_items += item.decode;
  report.cut_rows = static_cast<int64_t>(partition.merges().size());
  for (const Merge& merge : partition.merges())
    report.most_splits = std::max(report.most_splits, merge.num_splits);
  const DecodeShape shape = table.decode_shape(p);
  report.tile = shape.tile;
  report.stages = shape.stages;
  report.query_tile = table.prefill_query_tile(p);
  return report;
}

namespace {

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const std::optional<Tensor>& v_cache,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
    int64_t max_seqlen_q, double scale, bool causal, int64_t window, int64_t chunk, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t v_head_dim, const std::optional<Tensor>&,
    bool deterministic) {
  AttentionParams p = attention_arguments(
      q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, scale, causal, window,
      chunk, softcap, sinks, alibi_slopes, bias, k_scale, v_scale, v_head_dim, deterministic, kCpu);
  Tensor out = torch::stable::new_empty(q, {p.num_tokens, p.num_heads, p.v_head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.num_tokens, p.num_heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  attend(p);
  return {out, lse};
}

// The partition takes about a microsecond, less than reading one back would save: nothing is kept.
Tensor plan(const Tensor& seq_lens, const Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t,
            int64_t, bool) {
  check_place(seq_lens, "seq_lens", kCpu);
  return torch::stable::new_empty(seq_lens, {0}, ScalarType::Int);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykvcache_cpu, CPU, m) {
  KV_IMPL(m, "paged_attention", paged_attention);
  KV_IMPL(m, "plan", plan);
}

}  // namespace pykvcache
