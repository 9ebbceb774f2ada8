// What a call would launch, found by the code that launches it. No header of torch or CUDA here:
// the host compiler reads it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/kernel_shape.h"
#include "params.h"

namespace pykvcache::cuda {

// One attention kernel of the call. The plan and the merge of pieces are launches of their own.
struct LaunchReport {
  const char* kernel;   // "decode", "prefill", "wgmma_prefill" or "plain"
  KernelShape shape;    // of plain: rows and threads
  int64_t ctas;         // that have something to do
  int64_t cut_rows;     // decode: sequences that several CTAs share,
  int64_t most_splits;  // and into how many pieces the most cut one is
};

// A call with these lengths and no optional argument. Throws std::invalid_argument.
std::vector<LaunchReport> explain_launch(DType q, DType cache, int64_t heads, int64_t kv_heads,
                                         int64_t head_dim, int64_t block_size,
                                         std::span<const int64_t> seq_lens,
                                         std::span<const int64_t> query_lens);

}  // namespace pykvcache::cuda
