// What runs the kernels once arguments are known to fit, for the launchers of the operators and for
// LayerStep. No torch header here.
#pragma once

#include <cstdint>

#include "cpu/cache_kernels.h"
#include "params.h"

namespace pykvcache {

// Lengths and block ids, row by row, against a table of max_blocks columns: after this no kernel
// can leave the pool. Throws std::invalid_argument.
void check_rows(const AttentionParams& p, int64_t max_blocks, int64_t max_seqlen_q);

// Writes p.out and p.lse of checked rows, on torch's threads.
void attend(const AttentionParams& p);

// Throws std::invalid_argument for a slot past the end; negative ones skip their token.
void check_slots(const int64_t* slots, int64_t count, int64_t num_slots);

// Tokens of x [num_tokens, HKV, D] to checked slots, on torch's threads.
void write_side(const TokenView& x, const CacheView& cache, const ScaleView& scale,
                const int64_t* slots, int64_t num_tokens, int64_t heads, int64_t block_size);

}  // namespace pykvcache
