// The arguments of the cache operators, checked and as plain data: the same for every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "views.h"

namespace pykvcache {

// Throws for a slot past the end; -1 skips its token.
inline void check_slot_values(const int64_t* slots, int64_t count, int64_t num_slots) {
  for (int64_t t = 0; t < count; ++t)
    if (slots[t] < -1 || slots[t] >= num_slots)
      fail("slot_mapping[", t, "] is ", slots[t], " but the cache has ", num_slots,
           " slots, and only -1 skips a token");
}

// Where two elements are one, the order of writing decides what is left.
inline void check_no_overlap(const Tensor& cache, const char* name) {
  for (int64_t i = 0; i < cache.dim(); ++i)
    if (cache.size(i) > 1 && cache.stride(i) == 0)
      fail(name, " must not be expanded: its dim ", i, " has ", cache.size(i),
           " entries at one place");
}

inline WriteArguments write_arguments(const Tensor& k, const std::optional<Tensor>& v,
                                      const Tensor& k_cache, const std::optional<Tensor>& v_cache,
                                      const Tensor& slot_mapping,
                                      const std::optional<Tensor>& k_scale,
                                      const std::optional<Tensor>& v_scale, const Place& place) {
  if (v.has_value() != v_cache.has_value()) fail("v and v_cache must be given together");
  Dim T("T"), HKV("HKV"), D("D"), Dv("Dv"), num_blocks("num_blocks"), block_size("block_size");
  WriteArguments w;
  w.caches[0] = cache_view(k_cache, "k_cache", &num_blocks, &HKV, &block_size, &D, place);
  w.tokens[0] = token_view(k, "k", &T, &HKV, &D, place);
  if (w.caches[0].dtype != DType::kFloat8E4M3) check_dtype(k, "k", k_cache.scalar_type());
  check_no_overlap(k_cache, "k_cache");
  check_place(slot_mapping, "slot_mapping", place);
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long);
  check_shape(slot_mapping, "slot_mapping", {&T});
  check_last_dim_contiguous(slot_mapping, "slot_mapping");
  w.scales[0] = scale_view(k_scale, "k_scale", w.caches[0], HKV, block_size, place);
  if (v) {
    w.sides = 2;
    check_dtype(*v_cache, "v_cache", k_cache.scalar_type());
    check_dtype(*v, "v", k.scalar_type());
    w.caches[1] = cache_view(*v_cache, "v_cache", &num_blocks, &HKV, &block_size, &Dv, place);
    w.tokens[1] = token_view(*v, "v", &T, &HKV, &Dv, place);
    check_no_overlap(*v_cache, "v_cache");
    w.scales[1] = scale_view(v_scale, "v_scale", w.caches[1], HKV, block_size, place);
  }
  w.slots = const_data<int64_t>(slot_mapping);
  w.num_tokens = T;
  w.num_heads = HKV;
  w.block_size = block_size;
  w.num_slots = num_blocks * block_size;
  if (place.reads_values) check_slot_values(w.slots, T, w.num_slots);
  return w;
}

inline void check_pair_of_caches(const Tensor& src, const Tensor& dst, const int64_t* pairs,
                                 int64_t count, int64_t index, const Place& place) {
  const std::string at = std::string("[").append(std::to_string(index)).append("]");
  check_place(src, ("src" + at).c_str(), place);
  check_place(dst, ("dst" + at).c_str(), place);
  if (src.scalar_type() != dst.scalar_type())
    fail("src", at, " and dst", at, " must have one dtype, got ", dtype_name(src.scalar_type()),
         " and ", dtype_name(dst.scalar_type()));
  bool same = src.dim() == dst.dim() && src.dim() >= 1;
  for (int64_t i = 1; same && i < src.dim(); ++i) same = src.size(i) == dst.size(i);
  if (!same)
    fail("src", at, " and dst", at, " must have blocks of one shape, got shapes ", shape_of(src),
         " and ", shape_of(dst));
  for (int64_t n = 0; place.reads_values && n < count; ++n) {
    const int64_t from = pairs[2 * n], to = pairs[2 * n + 1];
    if (from < 0 || from >= src.size(0) || to < 0 || to >= dst.size(0))
      fail("pairs[", n, "] is (", from, ", ", to, ") but src", at, " has ", src.size(0),
           " blocks and dst", at, " has ", dst.size(0));
  }
}

// Copies run at once, so none may write what another one reads or writes.
inline void check_copies_apart(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                               const int64_t* pairs, int64_t count) {
  std::vector<int64_t> targets;
  for (int64_t n = 0; n < count; ++n) targets.push_back(pairs[2 * n + 1]);
  std::sort(targets.begin(), targets.end());
  const auto twice = std::adjacent_find(targets.begin(), targets.end());
  if (twice != targets.end()) fail("pairs has block ", *twice, " as a destination twice");
  bool in_place = false;
  for (size_t i = 0; i < src.size(); ++i)
    in_place = in_place || src[i].const_data_ptr() == dst[i].const_data_ptr();
  for (int64_t n = 0; in_place && n < count; ++n)
    if (std::binary_search(targets.begin(), targets.end(), pairs[2 * n]))
      fail("pairs has block ", pairs[2 * n], " as a source and as a destination");
}

// src and dst, and pairs [N, 2], of copy_blocks.
inline void check_copy(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                       const Tensor& pairs, const Place& place) {
  check_place(pairs, "pairs", place);
  check_dtype(pairs, "pairs", ScalarType::Long);
  if (pairs.dim() != 2 || pairs.size(1) != 2)
    fail("pairs must be [N, 2], got shape ", shape_of(pairs));
  if (pairs.size(0) > 0 && (pairs.stride(1) != 1 || pairs.stride(0) != 2))
    fail("pairs must be contiguous");
  if (src.size() != dst.size())
    fail("src and dst must be equally long, got ", src.size(), " and ", dst.size(), " caches");
  for (size_t i = 0; i < src.size(); ++i)
    check_pair_of_caches(src[i], dst[i], const_data<int64_t>(pairs), pairs.size(0),
                         static_cast<int64_t>(i), place);
  if (place.reads_values && !src.empty())
    check_copies_apart(src, dst, const_data<int64_t>(pairs), pairs.size(0));
}

// block_table [B, max_blocks] and seq_lens [B] against a pool of num_blocks blocks.
inline void check_table(const Tensor& block_table, const Tensor& seq_lens, Dim* B,
                        int64_t num_blocks, int64_t block_size, const Place& place) {
  Dim max_blocks("max_blocks");
  check_place(block_table, "block_table", place);
  check_place(seq_lens, "seq_lens", place);
  check_dtype(block_table, "block_table", ScalarType::Int);
  check_dtype(seq_lens, "seq_lens", ScalarType::Int);
  check_shape(block_table, "block_table", {B, &max_blocks});
  check_shape(seq_lens, "seq_lens", {B});
  check_last_dim_contiguous(block_table, "block_table");
  check_last_dim_contiguous(seq_lens, "seq_lens");
  const int32_t* table = const_data<int32_t>(block_table);
  const int32_t* lengths = const_data<int32_t>(seq_lens);
  for (int64_t b = 0; place.reads_values && b < *B; ++b) {
    if (lengths[b] < 0 || lengths[b] > max_blocks * block_size)
      fail("seq_lens[", b, "] is ", lengths[b], " but block_table holds 0 to ",
           max_blocks * block_size, " tokens a row");
    for (int64_t i = 0; i * block_size < lengths[b] && num_blocks >= 0; ++i)
      if (const int32_t block = table[b * block_table.stride(0) + i];
          block < -1 || block >= num_blocks)
        fail("block_table[", b, "][", i, "] is ", table[b * block_table.stride(0) + i],
             " but the cache has ", num_blocks, " blocks, and only -1 is a hole");
  }
}

// cu_seqlens [B + 1].
inline void check_starts(const Tensor& starts, const char* name, int64_t batch,
                         const Place& place) {
  Dim B1("B + 1", batch + 1);
  check_place(starts, name, place);
  check_dtype(starts, name, ScalarType::Int);
  check_shape(starts, name, {&B1});
  check_last_dim_contiguous(starts, name);
}

// The running sum of query counts, against the number of tokens.
inline void check_query_starts(const int32_t* starts, int64_t batch, int64_t num_tokens) {
  for (int64_t b = 0; b < batch; ++b)
    if (starts[0] != 0 || starts[b] > starts[b + 1])
      fail("cu_seqlens_q must rise from 0, got [", starts[b], ", ", starts[b + 1], ") at row ", b);
  if (starts[batch] > num_tokens)
    fail("cu_seqlens_q ends at ", starts[batch], " but num_tokens is ", num_tokens);
}

// The running sum of lengths.
inline void check_key_starts(const int32_t* starts, const int32_t* lengths, int64_t batch,
                             int64_t total_k) {
  for (int64_t b = 0; b < batch; ++b)
    if (starts[b] < 0 || starts[b + 1] - starts[b] != lengths[b] || starts[b + 1] > total_k)
      fail("cu_seqlens_k must be the running sum of seq_lens and end at total_k = ", total_k,
           "; row ", b, " has [", starts[b], ", ", starts[b + 1], ") for length ", lengths[b]);
}

}  // namespace pykvcache
