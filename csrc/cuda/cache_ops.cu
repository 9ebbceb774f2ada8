// Launchers of the cache operators: write_kv, copy_blocks, gather_kv, merge_states, slot_mapping.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cache_arguments.h"
#include "cuda/cache_kernels.cuh"
#include "cuda/kernels.h"
#include "cuda/merge.cuh"
#include "cuda/torch_device.h"

namespace pykvcache::cuda {
namespace {

void write_kv(const Tensor& k, const std::optional<Tensor>& v, const Tensor& k_cache,
              const std::optional<Tensor>& v_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const WriteArguments arguments =
      write_arguments(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, place_of(k_cache));
  const OnDevice device(k_cache);
  write(arguments, device.stream());
}

// Whether blocks of both lie in memory alike and without gaps: each is one run of bytes.
bool are_alike_and_dense(const Tensor& src, const Tensor& dst) {
  int64_t count = 1, reach = 1;
  for (int64_t i = 1; i < src.dim(); ++i) {
    if (src.size(i) == 1) continue;
    if (src.stride(i) != dst.stride(i)) return false;
    count *= src.size(i);
    reach += (src.size(i) - 1) * src.stride(i);
  }
  return count == reach;
}

// Other blocks are copied in slices: one launch for each index of their first dim.
void copy_caches(const Tensor& src, const Tensor& dst, const int64_t* pairs, int64_t count,
                 Stream stream) {
  const auto width = static_cast<int64_t>(src.element_size());
  if (count == 0 || src.numel() == 0) return;
  if (are_alike_and_dense(src, dst)) {
    CopyParams params;
    params.from = static_cast<const char*>(src.const_data_ptr());
    params.to = static_cast<char*>(dst.mutable_data_ptr());
    params.pairs = pairs;
    params.from_stride = src.stride(0) * width;
    params.to_stride = dst.stride(0) * width;
    params.block_bytes = src.numel() / src.size(0) * width;
    return copy_blocks(params, count, stream);
  }
  for (int64_t i = 0; i < src.size(1); ++i)
    copy_caches(torch::stable::select(src, 1, i), torch::stable::select(dst, 1, i), pairs, count,
                stream);
}

void copy_blocks_of_caches(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                           const Tensor& pairs) {
  check_copy(src, dst, pairs, place_of(pairs));
  const OnDevice device(pairs);
  for (size_t i = 0; i < src.size(); ++i)
    copy_caches(src[i], dst[i], const_data<int64_t>(pairs), pairs.size(0), device.stream());
}

std::tuple<Tensor, Tensor> gather_kv(const Tensor& k_cache, const std::optional<Tensor>& v_cache,
                                     const Tensor& block_table, const Tensor& seq_lens,
                                     const Tensor& cu_seqlens_k, int64_t total_k) {
  const Place place = place_of(k_cache);
  Dim B("B"), HKV("HKV"), D("D"), Dv("Dv"), num_blocks("num_blocks"), block_size("block_size");
  GatherParams params;
  params.caches[0] = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D, place);
  if (v_cache) {
    check_dtype(*v_cache, "v_cache", k_cache.scalar_type());
    params.caches[1] = cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv, place);
  }
  check_table(block_table, seq_lens, &B, num_blocks, block_size, place);
  check_starts(cu_seqlens_k, "cu_seqlens_k", B, place);
  params.block_table = const_data<int32_t>(block_table);
  params.cu_seqlens_k = const_data<int32_t>(cu_seqlens_k);
  if (place.reads_values)
    check_key_starts(params.cu_seqlens_k, const_data<int32_t>(seq_lens), B, total_k);
  params.block_table_stride = block_table.stride(0);
  params.batch = B;
  params.num_heads = HKV;
  params.total = total_k;
  params.block_size = Divisor(block_size);
  const OnDevice device(k_cache);
  Tensor k_out = torch::stable::new_empty(k_cache, {total_k, HKV, D});
  Tensor v_out =
      torch::stable::new_empty(k_cache, {total_k, HKV, v_cache ? static_cast<int64_t>(Dv) : 0});
  params.dense[0] = k_out.mutable_data_ptr();
  params.dense[1] = v_out.mutable_data_ptr();
  if (total_k > 0) gather(params, v_cache ? 2 : 1, device.stream());
  return {k_out, v_out};
}

std::tuple<Tensor, Tensor> merge_partials(const Tensor& outs_in, const Tensor& lses_in) {
  const Place place = place_of(outs_in);
  Dim S("S"), T("T"), HQ("HQ"), D("D");
  check_place(outs_in, "outs", place);
  check_place(lses_in, "lses", place);
  check_shape(outs_in, "outs", {&S, &T, &HQ, &D});
  check_shape(lses_in, "lses", {&S, &T, &HQ});
  check_dtype(lses_in, "lses", ScalarType::Float);
  check_float(outs_in, "outs");
  const DType dtype = to_dtype(outs_in, "outs");
  const OnDevice device(outs_in);
  const Tensor outs = torch::stable::contiguous(outs_in);
  const Tensor lses = torch::stable::contiguous(lses_in);
  Tensor out = torch::stable::new_empty(outs, {T, HQ, D});
  Tensor lse = torch::stable::new_empty(lses, {T, HQ});
  MergeStatesParams params{outs.const_data_ptr(),
                           const_data<float>(lses),
                           out.mutable_data_ptr(),
                           static_cast<float*>(lse.mutable_data_ptr()),
                           S,
                           T * HQ,
                           D};
  if (params.places > 0) merge_states(params, dtype, device.stream());
  return {out, lse};
}

Tensor slot_mapping(const Tensor& block_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                    int64_t num_tokens, int64_t block_size) {
  if (block_size < 1) fail("block_size must be at least 1, got ", block_size);
  const Place place = place_of(block_table);
  Dim B("B");
  check_table(block_table, seq_lens, &B, -1, block_size, place);
  check_starts(cu_seqlens_q, "cu_seqlens_q", B, place);
  SlotMappingParams params;
  params.block_table = const_data<int32_t>(block_table);
  params.seq_lens = const_data<int32_t>(seq_lens);
  params.cu_seqlens_q = const_data<int32_t>(cu_seqlens_q);
  if (place.reads_values) check_query_starts(params.cu_seqlens_q, B, num_tokens);
  const OnDevice device(block_table);
  Tensor slots =
      torch::stable::new_empty(block_table, {num_tokens}, std::make_optional(ScalarType::Long));
  params.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  params.block_table_stride = block_table.stride(0);
  params.max_blocks = block_table.size(1);
  params.batch = B;
  params.num_tokens = num_tokens;
  params.block_size = Divisor(block_size);
  if (num_tokens > 0) map_slots(params, device.stream());
  return slots;
}

}  // namespace
}  // namespace pykvcache::cuda

STABLE_TORCH_LIBRARY_IMPL(pykvcache_cuda, KV_CUDA_DISPATCH_KEY, m) {
  KV_IMPL(m, "write_kv", pykvcache::cuda::write_kv);
  KV_IMPL(m, "copy_blocks", pykvcache::cuda::copy_blocks_of_caches);
  KV_IMPL(m, "gather_kv", pykvcache::cuda::gather_kv);
  KV_IMPL(m, "merge_states", pykvcache::cuda::merge_partials);
  KV_IMPL(m, "slot_mapping", pykvcache::cuda::slot_mapping);
}
