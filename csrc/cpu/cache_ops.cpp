// Launchers of the cache operators: write_kv, copy_blocks, gather_kv, merge_states, slot_mapping.
// Each checks everything before it writes anything. The loops are in cache_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/launch.h"
#include "cpu/views.h"
#include "registration.h"

namespace pykvcache {
namespace {

constexpr int64_t kBytesPerTask = 1 << 17;  // below this a second thread costs more than it saves

int64_t grain_for(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_item));
}

}  // namespace

void check_slots(const int64_t* slots, int64_t count, int64_t num_slots) {
  for (int64_t t = 0; t < count; ++t)
    if (slots[t] >= num_slots)
      fail("slot_mapping[", t, "] is ", slots[t], " but the cache has ", num_slots, " slots");
}

void write_side(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                const int64_t* slots, int64_t num_tokens, int64_t heads, int64_t block_size) {
  const bool plain = cache.dtype == x.dtype && scale.kind == ScaleKind::kNone;
  if (!plain) fill_scales(x, cache, scale, slots, num_tokens, heads, block_size);
  const auto write = [&](int64_t begin, int64_t end) {
    if (plain)
      write_tokens(x, cache, slots, heads, block_size, begin, end);
    else
      write_tokens_quantised(x, cache, scale, slots, heads, block_size, begin, end);
  };
  const int64_t grain = grain_for(heads * cache.head_dim * element_size(cache.dtype));
  if (num_tokens <= grain)
    write(0, num_tokens);
  else
    torch::stable::parallel_for(0, num_tokens, grain, write);
}

namespace {

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

TokenView token_view(const Tensor& x, const char* name, Dim* tokens, Dim* heads, Dim* head_dim) {
  check_cpu(x, name);
  check_shape(x, name, {tokens, heads, head_dim});
  check_last_dim_contiguous(x, name);
  const DType dtype = to_dtype(x, name);
  if (dtype == DType::kFloat8E4M3 || dtype == DType::kBool)
    fail(name, " must be float32, float16 or bfloat16, got ", dtype_name(x.scalar_type()));
  return {x.const_data_ptr(), dtype, x.stride(0), x.stride(1)};
}

void check_cache_dtype(const CacheView& cache, const TokenView& x, const Tensor& x_tensor,
                       const char* name) {
  if (cache.dtype != x.dtype && cache.dtype != DType::kFloat8E4M3)
    fail(name, " must have the dtype of ", name, "_cache (or that be float8_e4m3fn), got ",
         dtype_name(x_tensor.scalar_type()));
}

void write_kv(const Tensor& k, const std::optional<Tensor>& v, const Tensor& k_cache,
              const std::optional<Tensor>& v_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  if (v.has_value() != v_cache.has_value()) fail("v and v_cache must be given together");
  Dim T("T"), HKV("HKV"), D("D"), Dv("Dv"), num_blocks("num_blocks"), block_size("block_size");
  const CacheView k_view = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D);
  const TokenView k_tokens = token_view(k, "k", &T, &HKV, &D);
  check_cache_dtype(k_view, k_tokens, k, "k");
  check_cpu(slot_mapping, "slot_mapping");
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long);
  check_shape(slot_mapping, "slot_mapping", {&T});
  check_last_dim_contiguous(slot_mapping, "slot_mapping");
  const ScaleView k_scales = scale_view(k_scale, "k_scale", k_view, HKV, block_size);
  const int64_t* slots = const_data<int64_t>(slot_mapping);
  CacheView v_view;
  TokenView v_tokens{};
  ScaleView v_scales;
  if (v) {
    v_view = cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv);
    v_tokens = token_view(*v, "v", &T, &HKV, &Dv);
    check_cache_dtype(v_view, v_tokens, *v, "v");
    v_scales = scale_view(v_scale, "v_scale", v_view, HKV, block_size);
  }
  check_slots(slots, T, num_blocks * block_size);
  write_side(k_tokens, k_view, k_scales, slots, T, HKV, block_size);
  if (v) write_side(v_tokens, v_view, v_scales, slots, T, HKV, block_size);
}

void check_pairs(const Tensor& src, const Tensor& dst, const int64_t* pairs, int64_t count,
                 int64_t index) {
  const std::string at = std::string("[").append(std::to_string(index)).append("]");
  check_cpu(src, ("src" + at).c_str());
  check_cpu(dst, ("dst" + at).c_str());
  if (src.scalar_type() != dst.scalar_type())
    fail("src", at, " and dst", at, " must have one dtype, got ", dtype_name(src.scalar_type()),
         " and ", dtype_name(dst.scalar_type()));
  bool same = src.dim() == dst.dim() && src.dim() >= 1;
  for (int64_t i = 1; same && i < src.dim(); ++i) same = src.size(i) == dst.size(i);
  if (!same)
    fail("src", at, " and dst", at, " must have blocks of one shape, got shapes ", shape_of(src),
         " and ", shape_of(dst));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t from = pairs[2 * n], to = pairs[2 * n + 1];
    if (from < 0 || from >= src.size(0) || to < 0 || to >= dst.size(0))
      fail("pairs[", n, "] is (", from, ", ", to, ") but src", at, " has ", src.size(0),
           " blocks and dst", at, " has ", dst.size(0));
  }
}

// One block: the inner dims of both sides walked together, whole runs at a time.
void copy_block(const char* from, char* to, const Tensor& src, const Tensor& dst, int64_t dim,
                int64_t width) {
  if (dim == src.dim()) {
    std::memcpy(to, from, static_cast<size_t>(width));
    return;
  }
  int64_t run = 1;  // elements in dims [dim, end) when both sides are dense there
  bool dense = true;
  for (int64_t i = src.dim() - 1; i >= dim && dense; --i) {
    dense = src.size(i) == 1 || (src.stride(i) == run && dst.stride(i) == run);
    run *= src.size(i);
  }
  if (dense) {
    std::memcpy(to, from, static_cast<size_t>(run * width));
    return;
  }
  for (int64_t i = 0; i < src.size(dim); ++i)
    copy_block(from + i * src.stride(dim) * width, to + i * dst.stride(dim) * width, src, dst,
               dim + 1, width);
}

void copy_blocks(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                 const Tensor& pairs) {
  check_cpu(pairs, "pairs");
  check_dtype(pairs, "pairs", ScalarType::Long);
  if (pairs.dim() != 2 || pairs.size(1) != 2)
    fail("pairs must be [N, 2], got shape ", shape_of(pairs));
  if (pairs.size(0) > 0 && (pairs.stride(1) != 1 || pairs.stride(0) != 2))
    fail("pairs must be contiguous");
  if (src.size() != dst.size())
    fail("src and dst must be equally long, got ", src.size(), " and ", dst.size(), " caches");
  const int64_t count = pairs.size(0);
  const int64_t* ids = const_data<int64_t>(pairs);
  for (size_t i = 0; i < src.size(); ++i)
    check_pairs(src[i], dst[i], ids, count, static_cast<int64_t>(i));
  for (size_t i = 0; i < src.size(); ++i) {
    const int64_t width = static_cast<int64_t>(src[i].element_size());
    const char* from = static_cast<const char*>(src[i].const_data_ptr());
    char* to = static_cast<char*>(dst[i].mutable_data_ptr());
    const auto copy = [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        copy_block(from + ids[2 * n] * src[i].stride(0) * width,
                   to + ids[2 * n + 1] * dst[i].stride(0) * width, src[i], dst[i], 1, width);
    };
    const int64_t block_bytes = src[i].size(0) ? src[i].numel() / src[i].size(0) * width : 0;
    torch::stable::parallel_for(0, count, grain_for(block_bytes), copy);
  }
}

// block_table [B, max_blocks] and seq_lens [B] against a pool of num_blocks blocks.
void check_table(const Tensor& block_table, const Tensor& seq_lens, Dim* B, int64_t num_blocks,
                 int64_t block_size) {
  Dim max_blocks("max_blocks");
  check_cpu(block_table, "block_table");
  check_cpu(seq_lens, "seq_lens");
  check_dtype(block_table, "block_table", ScalarType::Int);
  check_dtype(seq_lens, "seq_lens", ScalarType::Int);
  check_shape(block_table, "block_table", {B, &max_blocks});
  check_shape(seq_lens, "seq_lens", {B});
  check_last_dim_contiguous(block_table, "block_table");
  check_last_dim_contiguous(seq_lens, "seq_lens");
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  for (int64_t b = 0; b < *B; ++b) {
    if (lengths[b] < 0 || lengths[b] > max_blocks * block_size)
      fail("seq_lens[", b, "] is ", lengths[b], " but block_table holds 0 to ",
           max_blocks * block_size, " tokens a row");
    for (int64_t i = 0; i * block_size < lengths[b] && num_blocks >= 0; ++i)
      if (table[b * block_table.stride(0) + i] >= num_blocks)
        fail("block_table[", b, "][", i, "] is ", table[b * block_table.stride(0) + i],
             " but the cache has ", num_blocks, " blocks");
  }
}

// cu_seqlens [B + 1].
void check_starts(const Tensor& starts, const char* name, int64_t batch) {
  Dim B1("B + 1", batch + 1);
  check_cpu(starts, name);
  check_dtype(starts, name, ScalarType::Int);
  check_shape(starts, name, {&B1});
  check_last_dim_contiguous(starts, name);
}

std::tuple<Tensor, Tensor> gather_kv(const Tensor& k_cache, const std::optional<Tensor>& v_cache,
                                     const Tensor& block_table, const Tensor& seq_lens,
                                     const Tensor& cu_seqlens_k, int64_t total_k) {
  Dim B("B"), HKV("HKV"), D("D"), Dv("Dv"), num_blocks("num_blocks"), block_size("block_size");
  const CacheView k_view = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D);
  CacheView v_view;
  if (v_cache) v_view = cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv);
  check_table(block_table, seq_lens, &B, num_blocks, block_size);
  check_starts(cu_seqlens_k, "cu_seqlens_k", B);
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  const int32_t* starts = const_data<int32_t>(cu_seqlens_k);
  for (int64_t b = 0; b < B; ++b)
    if (starts[b] < 0 || starts[b + 1] - starts[b] != lengths[b] || starts[b + 1] > total_k)
      fail("cu_seqlens_k must be the running sum of seq_lens and end at total_k = ", total_k,
           "; row ", b, " has [", starts[b], ", ", starts[b + 1], ") for length ", lengths[b]);
  const int64_t v_dim = v_cache ? v_view.head_dim : 0;
  Tensor k_out = torch::stable::new_zeros(k_cache, {total_k, HKV, D});
  Tensor v_out = torch::stable::new_zeros(k_cache, {total_k, HKV, v_dim});
  const auto gather = [&](const CacheView& view, Tensor& dense) {
    const int64_t token_bytes = HKV * view.head_dim * element_size(view.dtype);
    char* out = static_cast<char*>(dense.mutable_data_ptr());
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        gather_row(view, table + b * block_table.stride(0), lengths[b], HKV, block_size,
                   out + starts[b] * token_bytes);
    });
  };
  gather(k_view, k_out);
  if (v_cache) gather(v_view, v_out);
  return {k_out, v_out};
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs_in, const Tensor& lses_in) {
  Dim S("S"), T("T"), HQ("HQ"), D("D");
  check_cpu(outs_in, "outs");
  check_cpu(lses_in, "lses");
  check_shape(outs_in, "outs", {&S, &T, &HQ, &D});
  check_shape(lses_in, "lses", {&S, &T, &HQ});
  check_dtype(lses_in, "lses", ScalarType::Float);
  const DType dtype = to_dtype(outs_in, "outs");
  const Tensor outs = torch::stable::contiguous(outs_in);
  const Tensor lses = torch::stable::contiguous(lses_in);
  Tensor out = torch::stable::new_empty(outs, {T, HQ, D});
  Tensor lse = torch::stable::new_empty(lses, {T, HQ});
  const int64_t rows = T * HQ;
  torch::stable::parallel_for(
      0, rows, grain_for(S * D * element_size(dtype)), [&](int64_t begin, int64_t end) {
        merge_rows(outs.const_data_ptr(), const_data<float>(lses), dtype, S, rows, D, begin, end,
                   out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()));
      });
  return {out, lse};
}

Tensor slot_mapping(const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                    int64_t num_tokens, int64_t block_size) {
  if (block_size < 1) fail("block_size must be at least 1, got ", block_size);
  Dim B("B");
  check_table(block_table, seq_lens, &B, -1, block_size);
  check_starts(cu_seqlens_q, "cu_seqlens_q", B);
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  const int32_t* starts = const_data<int32_t>(cu_seqlens_q);
  for (int64_t b = 0; b < B; ++b)
    if (starts[0] != 0 || starts[b] > starts[b + 1])
      fail("cu_seqlens_q must rise from 0, got [", starts[b], ", ", starts[b + 1], ") at row ", b);
  if (starts[B] > num_tokens)
    fail("cu_seqlens_q ends at ", starts[B], " but num_tokens is ", num_tokens);
  Tensor slots =
      torch::stable::new_empty(block_table, {num_tokens}, std::make_optional(ScalarType::Long));
  int64_t* out = static_cast<int64_t*>(slots.mutable_data_ptr());
  std::fill(out, out + num_tokens, int64_t{-1});
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = starts[b]; t < starts[b + 1]; ++t) {
      const int64_t position = int64_t{lengths[b]} - starts[b + 1] + t;
      if (position < 0) continue;
      const int64_t block = table[b * block_table.stride(0) + position / block_size];
      if (block >= 0) out[t] = block * block_size + position % block_size;
    }
  return slots;
}

}  // namespace
}  // namespace pykvcache

STABLE_TORCH_LIBRARY_IMPL(pykvcache_cpu, CPU, m) {
  using namespace pykvcache;
  KV_IMPL(m, "write_kv", write_kv);
  KV_IMPL(m, "copy_blocks", copy_blocks);
  KV_IMPL(m, "gather_kv", gather_kv);
  KV_IMPL(m, "merge_states", merge_states);
  KV_IMPL(m, "slot_mapping", slot_mapping);
}
