// One layer's part of decode steps over torch-free memory: what stays the same from step to step is
// set once, a call names what is new. The operators do the same for any batch; a trip through
// torch's dispatcher costs more than a short context's attention, which is why this exists.
#pragma once

#include <cstdint>

#include "cpu/cache_kernels.h"
#include "params.h"

namespace pykvcache {

class LayerStep {
 public:
  explicit LayerStep(bool deterministic) { params_.deterministic = deterministic; }

  // Float caches of one dtype.
  void set_caches(const CacheView& k, const CacheView& v, int64_t heads, int64_t block_size);

  // Metadata of `rows` rows with one query each; slots [rows], block_table [rows, columns].
  void set_batch(const int32_t* block_table, int64_t columns, const int32_t* seq_lens,
                 const int32_t* cu_seqlens_q, const int64_t* slots, int64_t rows);

  // k [rows, HKV, D] and v [rows, HKV, Dv] of the caches' dtype to the slots.
  void write(const TokenView& k, const TokenView& v) const;

  struct Query {
    const void* data;  // [rows, HQ, D], dtype of the caches
    int64_t stride_row, stride_head;
    int64_t heads;
    double scale, softcap;
    int64_t window, chunk;
    const float* sinks;  // [HQ], may be nullptr
    void* out;           // [rows, HQ, Dv], contiguous
  };
  void attend(const Query& query);

  DType dtype() const { return params_.k.dtype; }

 private:
  AttentionParams params_;
  const int64_t* slots_ = nullptr;
  int64_t columns_ = 0;
};

}  // namespace pykvcache
