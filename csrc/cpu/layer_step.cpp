#include "cpu/layer_step.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace pykvcache {
namespace {

void check_dim(const char* name, int64_t dim) {
  if (dim < 1 || dim > kMaxHeadDim)
    throw std::invalid_argument(std::string(name) + " must be 1 to " + std::to_string(kMaxHeadDim) +
                                ", got " + std::to_string(dim));
}

}  // namespace

void LayerStep::set_caches(const CacheView& k, const CacheView& v, int64_t heads,
                           int64_t block_size) {
  check_dim("D", k.head_dim);
  check_dim("Dv", v.head_dim);
  params_.k = k;
  params_.v = v;
  params_.q_dtype = k.dtype;
  params_.num_kv_heads = heads;
  params_.head_dim = k.head_dim;
  params_.v_head_dim = v.head_dim;
  params_.block_size = block_size;
}

void LayerStep::set_batch(const int32_t* block_table, int64_t columns, const int32_t* seq_lens,
                          const int32_t* cu_seqlens_q, const int64_t* slots, int64_t rows) {
  params_.block_table = block_table;
  params_.block_table_stride = columns_ = columns;
  params_.seq_lens = seq_lens;
  params_.cu_seqlens_q = cu_seqlens_q;
  params_.batch = params_.num_tokens = rows;
  slots_ = slots;
}

void LayerStep::write(const TokenView& k, const TokenView& v) const {
  const int64_t heads = params_.num_kv_heads, block_size = params_.block_size;
  check_slots(slots_, params_.batch, params_.k.num_blocks * block_size);
  write_side(k, params_.k, {}, slots_, params_.batch, heads, block_size);
  write_side(v, params_.v, {}, slots_, params_.batch, heads, block_size);
}

void LayerStep::attend(const Query& query) {
  if (!std::isfinite(query.scale))
    throw std::invalid_argument("scale must be finite, got " + std::to_string(query.scale));
  if (!std::isfinite(query.softcap) || query.softcap < 0)
    throw std::invalid_argument("softcap must be finite and not negative, got " +
                                std::to_string(query.softcap));
  thread_local std::vector<float> lse;
  lse.resize(params_.batch * query.heads);
  AttentionParams& p = params_;
  p.q = query.data;
  p.q_stride_token = query.stride_row;
  p.q_stride_head = query.stride_head;
  p.num_heads = query.heads;
  p.scale = static_cast<float>(query.scale);
  p.softcap = static_cast<float>(query.softcap);
  p.window = query.window;
  p.chunk = query.chunk;
  p.sinks = query.sinks;
  p.out = query.out;
  p.lse = lse.data();
  check_rows(p, columns_, 1);
  pykvcache::attend(p);
}

}  // namespace pykvcache
