// The arguments of paged_attention, checked and as plain data: the same for every device. Nothing
// here allocates or launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "views.h"

namespace pykvcache {

// Lengths and block ids, row by row, against a table of max_blocks columns.
inline void check_row_values(const AttentionParams& p, int64_t max_blocks, int64_t max_seqlen_q) {
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

inline const int32_t* int32_data(const Tensor& t, const char* name,
                                 std::initializer_list<Dim*> shape, const Place& place) {
  check_place(t, name, place);
  check_dtype(t, name, ScalarType::Int);
  check_shape(t, name, shape);
  check_last_dim_contiguous(t, name);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

inline const float* head_data(const std::optional<Tensor>& t, const char* name, Dim* heads,
                              const Place& place) {
  if (!t) return nullptr;
  check_place(*t, name, place);
  check_dtype(*t, name, ScalarType::Float);
  check_shape(*t, name, {heads});
  check_last_dim_contiguous(*t, name);
  return static_cast<const float*>(t->const_data_ptr());
}

inline BiasView bias_view(const Tensor& bias, const AttentionParams& p, const Place& place) {
  check_place(bias, "bias", place);
  int64_t max_q = 0, max_kv = 0;
  for (int64_t row = 0; place.reads_values && row < p.batch; ++row) {
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

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be ", low, " to ", high, ", got ", value);
}

// Everything but out and lse.
inline AttentionParams attention_arguments(
    const Tensor& q, const Tensor& k_cache, const std::optional<Tensor>& v_cache,
    const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
    int64_t max_seqlen_q, double scale, bool causal, int64_t window, int64_t chunk, double softcap,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t v_head_dim, bool deterministic,
    const Place& place) {
  Dim T("T"), HQ("HQ"), HKV("HKV"), D("D"), Dv("Dv"), B("B"), max_blocks("max_blocks");
  Dim num_blocks("num_blocks"), block_size("block_size");
  AttentionParams p;
  p.k = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D, place);
  p.v = v_cache ? cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv, place) : p.k;
  if (v_cache) check_dtype(*v_cache, "v_cache", k_cache.scalar_type());
  check_place(q, "q", place);
  check_shape(q, "q", {&T, &HQ, &D});
  check_last_dim_contiguous(q, "q");
  check_float(q, "q");
  p.q_dtype = to_dtype(q, "q");
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

  p.block_table = int32_data(block_table, "block_table", {&B, &max_blocks}, place);
  p.seq_lens = int32_data(seq_lens, "seq_lens", {&B}, place);
  Dim starts("B + 1", B + 1);
  p.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q", {&starts}, place);
  p.block_table_stride = block_table.stride(0);
  p.batch = B;
  p.num_tokens = T;
  p.num_heads = HQ;
  p.num_kv_heads = HKV;
  p.head_dim = D;
  p.v_head_dim = v_head_dim;
  p.block_size = block_size;
  if (place.reads_values) check_row_values(p, max_blocks, max_seqlen_q);
  p.q = q.const_data_ptr();
  p.q_stride_token = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.sinks = head_data(sinks, "sinks", &HQ, place);
  p.alibi_slopes = head_data(alibi_slopes, "alibi_slopes", &HQ, place);
  if (bias) p.bias = bias_view(*bias, p, place);
  p.k_scale = scale_view(k_scale, "k_scale", p.k, HKV, block_size, place);
  p.v_scale = v_cache ? scale_view(v_scale, "v_scale", p.v, HKV, block_size, place) : p.k_scale;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.causal = causal;
  p.window = window;
  p.chunk = chunk;
  p.deterministic = deterministic;
  return p;
}

}  // namespace pykvcache
