// From the arguments of a call to its launches: which kernels, how much workspace, in which order.
// No torch header and no waiting for the device, so that a call can be captured in a graph.
#pragma once

#include <algorithm>

#include "cuda/capability.h"
#include "cuda/kernels.h"

namespace pykvcache::cuda {

// function(HeadDim<class>())
template <class Function>
auto dispatch_head_dim([[maybe_unused]] int head_dim, Function&& function) {
  if constexpr (kLargestHeadDim >= 256)
    if (head_dim == 256) return function(HeadDim<256>());
  if constexpr (kLargestHeadDim >= 128)
    if (head_dim == 128) return function(HeadDim<128>());
  return function(HeadDim<64>());
}

constexpr int64_t kMostRowTiles = 8;  // a query tile of prefill

// Sequences of up to this many query rows are decode's: one row tile, or one token of a larger
// group. Prefill has one CTA for a query tile and KV head; where these are few (speculative tokens,
// the end of a prompt whose beginning is cached) and there are processors for a CTA of each row
// tile, all sequences of the call are decode's. Their row tiles go through the same keys at the
// same time, and the L2 cache reads them once. It depends on the batch: not when deterministic.
inline int32_t decode_rows(const AttentionParams& p, int64_t max_seqlen_q) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const auto tiles = [](int64_t rows) { return (rows + kRowTile - 1) / kRowTile; };
  const int64_t token = tiles(group), longest = tiles(max_seqlen_q * group);
  const int64_t columns = std::max<int64_t>(1, p.batch * p.num_kv_heads);
  const int64_t most = std::min<int64_t>(kMostRowTiles, processors_of_device() * 3 / 4 / columns);
  const bool wide = !p.deterministic && longest > token && longest <= most;
  return static_cast<int32_t>((wide ? longest : token) * kRowTile);
}

inline KernelParams kernel_params(const AttentionParams& p, int64_t max_seqlen_q) {
  KernelParams params;
  params.attention = p;
  params.block_size = Divisor(p.block_size);
  params.group = Divisor(p.num_heads / p.num_kv_heads);
  params.decode_rows = decode_rows(p, max_seqlen_q);
  params.piece_units = p.deterministic ? kFixedUnits : 1;
  return params;
}

struct Schedule {
  KernelParams params;
  int head_dim = 0;  // class of the tensor-core kernels; 0: plain
  bool decodes = false;
  bool prefills = false;
  bool prefills_with_wgmma = false;
  int64_t slots = 0;  // pieces that decode may leave in the workspace

  int64_t part_states_count() const {
    return slots * params.attention.num_kv_heads * params.merged_rows;
  }
  int64_t part_values_count() const { return part_states_count() * params.attention.v_head_dim; }
};

// max_blocks: columns of the block table.
inline Schedule make_schedule(const AttentionParams& p, int64_t max_seqlen_q, int64_t max_blocks) {
  Schedule s;
  s.params = kernel_params(p, max_seqlen_q);
  const auto fits = [&](const Capability& kernel) {
    if (kernel.head_dim == 0) return true;
    if (kernel.head_dim > kLargestHeadDim) return false;
    return dispatch_head_dim(kernel.head_dim, [&](auto dim) {
      if (kernel.wgmma) return wgmma_is_wanted() && dim.has_wgmma_prefill(s.params);
      return std::max(dim.decode_shape(s.params).shared_bytes,
                      dim.prefill_shape(s.params).shared_bytes) <= shared_bytes_of_device();
    });
  };
  s.head_dim = choose_kernel(p, Phase::kDecode, fits).head_dim;
  if (s.head_dim == 0) return s;
  const int64_t longest = max_seqlen_q * s.params.group.divisor;  // query rows
  s.prefills = longest > s.params.decode_rows;
  s.prefills_with_wgmma = s.prefills && choose_kernel(p, Phase::kPrefill, fits).wgmma;
  s.decodes = !(s.prefills && p.num_tokens == p.batch * max_seqlen_q);  // all of them are that long
  s.params.merged_rows = static_cast<int32_t>(std::min<int64_t>(longest, s.params.decode_rows));
  const int64_t columns = p.num_kv_heads * row_tiles(s.params);
  const int ctas =
      dispatch_head_dim(s.head_dim, [&](auto dim) { return dim.resident_decode_ctas(s.params); });
  s.params.programs = static_cast<int32_t>(std::max<int64_t>(1, ctas / columns));
  const int64_t piece_keys = int64_t{kFixedUnits} * kUnit;
  s.slots = p.deterministic
                ? p.batch * ((max_blocks * p.block_size + piece_keys - 1) / piece_keys + 1)
                : s.params.programs + p.batch;
  return s;
}

// Needs params.plan (made here unless `has_plan`), part_values and part_states if it decodes.
inline void run(const Schedule& s, bool has_plan, Stream stream) {
  if (s.head_dim == 0) return attend_plainly(s.params, stream);
  if (s.decodes && !has_plan) plan(s.params, stream);
  dispatch_head_dim(s.head_dim, [&](auto dim) {
    if (s.decodes) dim.decode(s.params, stream);
    if (s.prefills_with_wgmma)
      dim.prefill_with_wgmma(s.params, stream);
    else if (s.prefills)
      dim.prefill(s.params, stream);
  });
  if (s.decodes) merge_pieces(s.params, stream);
}

}  // namespace pykvcache::cuda
