// Which KV positions a query may see; the one place that knows causal, window and chunk. Static
// functions only: both the launcher and the per-instruction-set kernels include this.
#pragma once

#include <cstdint>

#include "params.h"

namespace pykvcache {

struct KvRange {
  int64_t begin;
  int64_t end;
};

// Keys that the query at `position` of a row with `seq_len` keys sees; empty for position < 0 (the
// padded part of a left-padded row).
static inline KvRange visible_keys(const AttentionParams& p, int64_t position, int64_t seq_len) {
  if (position < 0) return {0, 0};
  int64_t begin = 0;
  if (p.window > 0 && position - p.window + 1 > begin) begin = position - p.window + 1;
  if (p.chunk > 0 && position / p.chunk * p.chunk > begin) begin = position / p.chunk * p.chunk;
  return {begin, p.causal ? position + 1 : seq_len};
}

// Union over the queries at positions [first, last]: both ends only move forward with the position.
static inline KvRange visible_keys(const AttentionParams& p, int64_t first, int64_t last,
                                   int64_t seq_len) {
  if (last < 0) return {0, 0};
  return {visible_keys(p, first < 0 ? 0 : first, seq_len).begin,
          visible_keys(p, last, seq_len).end};
}

}  // namespace pykvcache
