// Which query rows a CTA of prefill takes: kRows consecutive rows of the q_len * G of a sequence
// (row r: token r / G, head r % G) for one KV head.
//
//   grid (query tiles of all rows, HKV)
//
// How many tiles a sequence has is known on the device only, so the grid is an upper bound:
// sequence b's tiles begin at number cu_seqlens_q[b] * G / kRows + b, which leaves at most one gap
// after each. Tiles are taken from the end, where causal rows see the most keys.
#pragma once

#include "cuda/logits.cuh"

namespace pykvcache::cuda {

template <int kRows>
struct QueryTiles {
  // Tiles of a grid that surely suffices.
  static int64_t count(const KernelParams& params) {
    const AttentionParams& p = params.attention;
    return p.num_tokens * params.group.divisor / kRows + p.batch;
  }

  __device__ __forceinline__ static int64_t first_tile(const KernelParams& params, int32_t row) {
    return params.attention.cu_seqlens_q[row] * static_cast<int64_t>(params.group.divisor) / kRows +
           row;
  }

  // The last sequence whose tiles begin at or before `tile`.
  __device__ __forceinline__ static int32_t sequence_of(const KernelParams& params, int64_t tile) {
    int32_t low = 0, high = static_cast<int32_t>(params.attention.batch) - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (first_tile(params, middle) <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  // The rows of this CTA; false if there are none, or if decode takes the sequence.
  __device__ __forceinline__ static bool find(const KernelParams& params, WarpRows& rows) {
    const int64_t tile = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
    const int32_t row = sequence_of(params, tile);
    rows.sequence = load_sequence(params.attention, row);
    rows.kv_head = blockIdx.y;
    rows.end = rows.sequence.q_len * static_cast<int32_t>(params.group.divisor);
    const int64_t first = (tile - first_tile(params, row)) * kRows;
    rows.first = static_cast<int32_t>(first);
    return first < rows.end && rows.end > params.decode_rows;
  }

  // Keys [begin, end) that some row of the tile sees; rows are in order of position.
  __device__ __forceinline__ static KeyRange keys(const KernelParams& params,
                                                  const WarpRows& rows) {
    const int32_t last = rows.first + kRows < rows.end ? rows.first + kRows : rows.end;
    const int32_t lowest = query_row(params, rows.sequence, rows.kv_head, rows.first).position;
    const int32_t highest = query_row(params, rows.sequence, rows.kv_head, last - 1).position;
    const AttentionParams& p = params.attention;
    return {visible_keys(p, rows.sequence, lowest > 0 ? lowest : 0).begin,
            visible_keys(p, rows.sequence, highest).end};
  }
};

}  // namespace pykvcache::cuda
