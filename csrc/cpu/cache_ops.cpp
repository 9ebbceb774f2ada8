// Launchers of the cache operators: write_kv, copy_blocks, gather_kv, merge_states, slot_mapping.
// Each checks everything before it writes anything. The loops are in cache_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cache_arguments.h"
#include "cpu/launch.h"
#include "registration.h"

namespace pykvcache {
namespace {

constexpr Place kCpu{"cpu"};
constexpr int64_t kBytesPerTask = 1 << 17;  // below this a second thread costs more than it saves

int64_t grain_for(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_item));
}

}  // namespace

void check_slots(const int64_t* slots, int64_t count, int64_t num_slots) {
  check_slot_values(slots, count, num_slots);
}

void write_side(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                const int64_t* slots, int64_t num_tokens, int64_t heads, int64_t block_size) {
  if (scale.kind == ScaleKind::kChannel)
    fill_channel_scales(x, cache, scale, slots, num_tokens, heads, block_size);
  const auto write = [&](int64_t begin, int64_t end) {
    if (cache.dtype == DType::kFloat8E4M3)
      write_tokens_float8(x, cache, scale, slots, heads, block_size, begin, end);
    else if (scale.kind == ScaleKind::kNone)
      write_tokens(x, cache, slots, heads, block_size, begin, end);
    else
      write_tokens_scaled(x, cache, scale, slots, heads, block_size, begin, end);
  };
  const int64_t grain = grain_for(heads * cache.head_dim * element_size(cache.dtype));
  if (num_tokens <= grain)
    write(0, num_tokens);
  else
    torch::stable::parallel_for(0, num_tokens, grain, write);
}

namespace {

void write_kv(const Tensor& k, const std::optional<Tensor>& v, const Tensor& k_cache,
              const std::optional<Tensor>& v_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const WriteArguments w =
      write_arguments(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, kCpu);
  for (int side = 0; side < w.sides; ++side)
    write_side(w.tokens[side], w.caches[side], w.scales[side], w.slots, w.num_tokens, w.num_heads,
               w.block_size);
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
  check_copy(src, dst, pairs, kCpu);
  const int64_t count = pairs.size(0);
  const int64_t* ids = const_data<int64_t>(pairs);
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

std::tuple<Tensor, Tensor> gather_kv(const Tensor& k_cache, const std::optional<Tensor>& v_cache,
                                     const Tensor& block_table, const Tensor& seq_lens,
                                     const Tensor& cu_seqlens_k, int64_t total_k) {
  Dim B("B"), HKV("HKV"), D("D"), Dv("Dv"), num_blocks("num_blocks"), block_size("block_size");
  const CacheView k_view = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D, kCpu);
  CacheView v_view;
  if (v_cache) {
    check_dtype(*v_cache, "v_cache", k_cache.scalar_type());
    v_view = cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv, kCpu);
  }
  check_table(block_table, seq_lens, &B, num_blocks, block_size, kCpu);
  check_starts(cu_seqlens_k, "cu_seqlens_k", B, kCpu);
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  const int32_t* starts = const_data<int32_t>(cu_seqlens_k);
  check_key_starts(starts, lengths, B, total_k);
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
  check_place(outs_in, "outs", kCpu);
  check_place(lses_in, "lses", kCpu);
  check_shape(outs_in, "outs", {&S, &T, &HQ, &D});
  check_shape(lses_in, "lses", {&S, &T, &HQ});
  check_dtype(lses_in, "lses", ScalarType::Float);
  check_float(outs_in, "outs");
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
  check_table(block_table, seq_lens, &B, -1, block_size, kCpu);
  check_starts(cu_seqlens_q, "cu_seqlens_q", B, kCpu);
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  const int32_t* starts = const_data<int32_t>(cu_seqlens_q);
  check_query_starts(starts, B, num_tokens);
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
