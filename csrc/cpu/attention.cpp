// Launcher of paged_attention: check, sizes, allocate, fill params, partition, run on torch's
// threads. Nothing is written before everything is checked. The kernels are in kernels/.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/launches.h"
#include "cpu/partition.h"
#include "cpu/views.h"
#include "registration.h"

namespace pykvcache {
namespace {

// Memory of one thread that lives as long as the thread and only grows.
class ThreadBuffer {
 public:
  ThreadBuffer() = default;
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  ~ThreadBuffer() { std::free(data_); }

  void* at_least(int64_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, static_cast<size_t>(size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

void check_rows(const AttentionParams& p, int64_t max_blocks, int64_t max_seqlen_q) {
  const int32_t* starts = p.cu_seqlens_q;
  if (starts[0] != 0) fail("cu_seqlens_q must start at 0, got ", starts[0]);
  if (starts[p.batch] != p.num_tokens)
    fail("cu_seqlens_q must end at T = ", p.num_tokens, ", got ", starts[p.batch]);
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t q_len = static_cast<int64_t>(starts[row + 1]) - starts[row];
    if (q_len < 0)
      fail("cu_seqlens_q must not fall: it goes from ", starts[row], " to ", starts[row + 1],
           " at row ", row);
    if (q_len > max_seqlen_q)
      fail("max_seqlen_q is ", max_seqlen_q, " but row ", row, " has ", q_len, " queries");
    const int64_t length = p.seq_lens[row];
    if (length < 0) fail("seq_lens[", row, "] must not be negative, got ", length);
    const int64_t used = (length + p.block_size - 1) / p.block_size;
    if (used > max_blocks)
      fail("seq_lens[", row, "] is ", length, " but block_table holds ", max_blocks * p.block_size,
           " tokens a row");
    const int32_t* blocks = p.block_table + row * p.block_table_stride;
    int32_t lowest = 0, highest = -1;
    for (int64_t i = 0; i < used; ++i) {
      lowest = std::min(lowest, blocks[i]);
      highest = std::max(highest, blocks[i]);
    }
    if (highest >= p.k.num_blocks || lowest < -1)
      fail("block_table has block ", lowest < -1 ? lowest : highest, " in row ", row,
           " but k_cache has ", p.k.num_blocks);
  }
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

  const auto run_item = [&](const WorkItem& item, void* scratch) {
    AttentionItem part = item.part;
    const Merge* merge = item.merge < 0 ? nullptr : &merges[item.merge];
    if (merge != nullptr) {
      const int64_t row = part.row;
      const int64_t places = (p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row]) * p.num_heads;
      part.partial_out = partials + merge->out_offset + item.split * places * p.v_head_dim;
      part.partial_lse = partials + merge->lse_offset + item.split * places;
    }
    (item.decode ? table.decode : table.prefill)(p, part, scratch);
    if (merge != nullptr && unfinished[item.merge].fetch_sub(1) == 1)
      table.merge_splits(p, merge->whole, partials + merge->out_offset,
                         partials + merge->lse_offset, merge->num_splits);
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
                            std::span<const int64_t> seq_lens,
                            std::span<const int64_t> query_lens) {
  const std::vector<int32_t> lengths(seq_lens.begin(), seq_lens.end());
  std::vector<int32_t> starts(1, 0);
  for (const int64_t count : query_lens) starts.push_back(starts.back() + static_cast<int>(count));
  AttentionParams p;
  p.q_dtype = p.k.dtype = p.v.dtype = dtype;
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = p.v_head_dim = head_dim;
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

const int32_t* int32_data(const Tensor& t, const char* name, std::initializer_list<Dim*> shape) {
  check_cpu(t, name);
  check_dtype(t, name, ScalarType::Int);
  check_shape(t, name, shape);
  check_last_dim_contiguous(t, name);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

const float* head_data(const std::optional<Tensor>& t, const char* name, Dim* heads) {
  if (!t) return nullptr;
  check_cpu(*t, name);
  check_dtype(*t, name, ScalarType::Float);
  check_shape(*t, name, {heads});
  check_last_dim_contiguous(*t, name);
  return static_cast<const float*>(t->const_data_ptr());
}

BiasView bias_view(const Tensor& bias, const AttentionParams& p) {
  check_cpu(bias, "bias");
  int64_t max_q = 0, max_kv = 0;
  for (int64_t row = 0; row < p.batch; ++row) {
    max_q = std::max<int64_t>(max_q, p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row]);
    max_kv = std::max<int64_t>(max_kv, p.seq_lens[row]);
  }
  const auto fits = [&](int64_t dim, int64_t size, bool exact) {
    const int64_t got = bias.size(dim);
    return got == 1 || (exact ? got == size : got >= size);
  };
  if (bias.dim() != 4 || !fits(0, p.batch, true) || !fits(1, p.num_heads, true) ||
      !fits(2, max_q, false) || !fits(3, max_kv, false))
    fail("bias must broadcast to [B, HQ, max_q, max_kv] = [", p.batch, ", ", p.num_heads, ", ",
         max_q, ", ", max_kv, "], got shape ", shape_of(bias));
  BiasView view;
  view.data = bias.const_data_ptr();
  view.dtype = to_dtype(bias, "bias");
  if (view.dtype == DType::kFloat8E4M3) fail("bias must be float or bool, got float8_e4m3fn");
  const auto stride = [&](int64_t dim) { return bias.size(dim) == 1 ? 0 : bias.stride(dim); };
  view.stride_batch = stride(0);
  view.stride_head = stride(1);
  view.stride_query = stride(2);
  view.stride_key = stride(3);
  return view;
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be ", low, " to ", high, ", got ", value);
}

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const std::optional<Tensor>& v_cache,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
    int64_t max_seqlen_q, double scale, bool causal, int64_t window, int64_t chunk, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t v_head_dim, const std::optional<Tensor>&,
    bool deterministic) {
  Dim T("T"), HQ("HQ"), HKV("HKV"), D("D"), Dv("Dv"), B("B"), max_blocks("max_blocks");
  Dim num_blocks("num_blocks"), block_size("block_size");
  AttentionParams p;
  p.k = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D);
  p.v = v_cache ? cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv) : p.k;
  if (p.v.dtype != p.k.dtype)
    fail("v_cache must be ", dtype_name(k_cache.scalar_type()), ", got ",
         dtype_name(v_cache->scalar_type()));
  check_cpu(q, "q");
  check_shape(q, "q", {&T, &HQ, &D});
  check_last_dim_contiguous(q, "q");
  p.q_dtype = to_dtype(q, "q");
  for (const DType dtype : {p.q_dtype, p.k.dtype})
    if (dtype == DType::kBool || (dtype == DType::kFloat8E4M3 && p.q_dtype == dtype))
      fail(dtype == p.q_dtype ? "q" : "k_cache", " must be float32, float16 or bfloat16");
  check_range("D", D, 1, kMaxHeadDim);
  check_range("v_head_dim", v_head_dim, 1, std::min(p.v.head_dim, kMaxHeadDim));
  if (HKV < 1 || HQ < 1 || HQ % HKV != 0)
    fail("HQ must be a multiple of HKV: got ", static_cast<int64_t>(HQ), " and ",
         static_cast<int64_t>(HKV));
  if (window < 0) fail("window must not be negative, got ", window);
  if (chunk < 0) fail("chunk must not be negative, got ", chunk);
  if (!std::isfinite(scale)) fail("scale must be finite, got ", std::to_string(scale));
  if (!std::isfinite(softcap)) fail("softcap must be finite, got ", std::to_string(softcap));
  if (softcap < 0) fail("softcap must not be negative, got ", std::to_string(softcap));

  p.block_table = int32_data(block_table, "block_table", {&B, &max_blocks});
  p.seq_lens = int32_data(seq_lens, "seq_lens", {&B});
  Dim starts("B + 1", B + 1);
  p.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", {&starts});
  p.block_table_stride = block_table.stride(0);
  p.batch = B;
  p.num_tokens = T;
  p.num_heads = HQ;
  p.num_kv_heads = HKV;
  p.head_dim = D;
  p.v_head_dim = v_head_dim;
  p.block_size = block_size;
  check_rows(p, max_blocks, max_seqlen_q);
  p.q = q.const_data_ptr();
  p.q_stride_token = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.sinks = head_data(sinks, "sinks", &HQ);
  p.alibi_slopes = head_data(alibi_slopes, "alibi_slopes", &HQ);
  if (bias) p.bias = bias_view(*bias, p);
  p.k_scale = scale_view(k_scale, "k_scale", p.k, HKV, block_size);
  p.v_scale = v_cache ? scale_view(v_scale, "v_scale", p.v, HKV, block_size) : p.k_scale;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.causal = causal;
  p.window = window;
  p.chunk = chunk;
  p.deterministic = deterministic;

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
  check_cpu(seq_lens, "seq_lens");
  return torch::stable::new_empty(seq_lens, {0}, ScalarType::Int);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykvcache_cpu, CPU, m) {
  KV_IMPL(m, "paged_attention", paged_attention);
  KV_IMPL(m, "plan", plan);
}

}  // namespace pykvcache
