// Combines the splits of a segment: out = sum_s out_s 2^(max_s - max) / (sum_s sum_s 2^(max_s -
// max)
// + 2^(sink - max)), all in float and in the order of the splits.
#include "cpu/kernels.h"
#include "cpu/kernels/softmax.h"

namespace pykvcache::KV_ISA {
namespace {

template <class T>
void merge_rows(const AttentionParams& p, const AttentionItem& whole, const float* partial_out,
                const PartialState* partial_states, int64_t num_splits) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t row_begin = p.cu_seqlens_q[whole.row];
  const int64_t split_stride = (p.cu_seqlens_q[whole.row + 1] - row_begin) * p.num_heads;
  float total[kMaxHeadDim + kWidth];
  for (int64_t query = whole.q_begin; query < whole.q_end; ++query) {
    for (int64_t head = whole.head_begin * group; head < whole.head_end * group; ++head) {
      const int64_t at = query * p.num_heads + head;
      float max = kNoMax;
      for (int64_t s = 0; s < num_splits; ++s)
        max = max_of(max, partial_states[s * split_stride + at].highest);
      float sum = 0.0f;
      for (int64_t d = 0; d < p.v_head_dim; d += kWidth) store(total + d, zero());
      for (int64_t s = 0; s < num_splits; ++s) {
        const int64_t from = s * split_stride + at;
        const float weight = exp2_scalar(partial_states[from].highest - max);
        sum += partial_states[from].sum * weight;
        add_scaled(total, partial_out + from * p.v_head_dim, weight, p.v_head_dim);
      }
      const Normalizer n = normalize(max, sum, p.sinks == nullptr ? nullptr : p.sinks + head);
      const int64_t to = row_begin * p.num_heads + at;
      p.lse[to] = n.lse;
      store_scaled(static_cast<T*>(p.out) + to * p.v_head_dim, total, n.scale, p.v_head_dim);
    }
  }
}

}  // namespace

void merge_splits(const AttentionParams& p, const AttentionItem& whole, const float* partial_out,
                  const PartialState* partial_states, int64_t num_splits) {
  switch (p.q_dtype) {
    case DType::kBFloat16:
      return merge_rows<BFloat16>(p, whole, partial_out, partial_states, num_splits);
    case DType::kFloat16:
      return merge_rows<Float16>(p, whole, partial_out, partial_states, num_splits);
    default:
      return merge_rows<float>(p, whole, partial_out, partial_states, num_splits);
  }
}

}  // namespace pykvcache::KV_ISA
