// How kernels are launched where a table says other than they do by themselves: a process-wide list
// of entries, set from Python and read by every call. No torch header here.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "params.h"

namespace pykvcache {

// Serves head dims and element sizes within these bounds.
struct LaunchEntry {
  enum Phase : int64_t { kDecode, kPrefill };
  int64_t phase, min_dim, max_dim, min_bytes, max_bytes;
  Launch launch;
};

// Calls that start later read these; the first entry that fits is taken. Throws
// std::invalid_argument.
void set_launches(std::vector<LaunchEntry> entries);

// What a call does, found by the code that does it.
struct LaunchReport {
  int64_t threads, items, decode_items;
  int64_t cut_rows, most_splits;  // rows (or query tiles) that are merged from splits
  int64_t tile, stages;           // of decode items, see DecodeShape
  int64_t query_tile;             // queries of an item of the general kernel, at most
};
LaunchReport explain_launch(DType dtype, int64_t heads, int64_t kv_heads, int64_t head_dim,
                            int64_t block_size, std::span<const int64_t> seq_lens,
                            std::span<const int64_t> query_lens);

// The decode entry's tile, stages and splits, and the prefill entry's rows; 0 where none fits.
Launch choose_launch(const AttentionParams& p);

}  // namespace pykvcache
