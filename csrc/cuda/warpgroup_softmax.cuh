// From scores in the registers of a warpgroup to weights: which keys a row sees, logits, the online
// softmax. Lane (g = lane / 4, t = lane % 4) holds rows g and g + 8 of its warp's 16, and of every
// 8 keys the two from 2t; the sum of a row is spread over its four lanes until finish().
#pragma once

#include "cuda/logits.cuh"

namespace pykvcache::cuda {

// kKeys: of a tile.
template <int kKeys>
struct WarpgroupSoftmax {
  using Scores = float[kKeys / 8][4];
  static constexpr unsigned kAll = 0xffffffffu;

  // The keys that the scores belong to.
  struct Tile {
    int32_t begin;                 // position of the first
    uint32_t present[kKeys / 32];  // bit per key: it is there

    __device__ __forceinline__ bool all_present() const {
      uint32_t all = present[0];
#pragma unroll
      for (int i = 1; i < kKeys / 32; ++i) all &= present[i];
      return all == ~0u;
    }
  };

  SoftmaxState state[2];
  KeyRange range[2];  // that the two rows see
  int32_t first_row;  // of the sequence; the other is eight rows on
  float scale;        // of scores, with the k_scale of the head

  __device__ __forceinline__ void start(const KernelParams& params, const WarpRows& rows,
                                        int32_t first) {
    const AttentionParams& p = params.attention;
    first_row = first;
    scale = p.scale * head_scale(p.k_scale, rows.kv_head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state[half] = SoftmaxState();
      range[half] = {0, INT32_MAX};  // a row that is not there must not make others compute masks
      if (first + 8 * half < rows.end)
        range[half] = visible_keys(p, rows.sequence, query(params, rows, half).position);
    }
  }

  __device__ __forceinline__ QueryRow query(const KernelParams& params, const WarpRows& rows,
                                            int half) const {
    return query_row(params, rows.sequence, rows.kv_head, first_row + 8 * half);
  }

  // Scores become weights. What was summed before must be multiplied by `factors`.
  __device__ __forceinline__ void weigh(const KernelParams& params, const WarpRows& rows,
                                        const Tile& tile, int lane, Scores& scores,
                                        float (&factors)[2]) {
    float to_logit = scale * kLog2e;
    if (!has_plain_logits(params.attention) || !(to_logit > 0.0f)) {
      modify(params, rows, tile, lane, scores);
      to_logit = 1.0f;
    }
    hide(tile, lane, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = kNothing;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAll, top, 2));
      factors[half] = state[half].raise(top * to_logit);
      const float base = state[half].base();
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = exp2_fast(scores[j][i] * to_logit - base);
          state[half].sum += scores[j][i];
        }
    }
  }

  // Completes the sums of the rows. All lanes of a row then have the same state.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = state[half].sum;
      sum += __shfl_xor_sync(kAll, sum, 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
    }
  }

 private:
  // Of element i (0 to 3) of the j-th eight keys.
  __device__ __forceinline__ static int32_t key_of(const Tile& tile, int j, int i, int lane) {
    return tile.begin + 8 * j + 2 * (lane % 4) + i % 2;
  }

  // Keys that a row does not see, or that are not there, get no weight; most tiles have none.
  __device__ __forceinline__ void hide(const Tile& tile, int lane, Scores& scores) const {
    const int32_t end = tile.begin + kKeys;
    if (tile.all_present() && range[0].begin <= tile.begin && end <= range[0].end &&
        range[1].begin <= tile.begin && end <= range[1].end)
      return;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const uint32_t present = tile.present[j / 4] >> (8 * (j % 4) + 2 * (lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t key = key_of(tile, j, i, lane);
        if (!(present >> i % 2 & 1u) || key < range[i / 2].begin || key >= range[i / 2].end)
          scores[j][i] = kNothing;
      }
    }
  }

  // Logits in base 2, with softcap and ALiBi (see logits.cuh).
  __device__ __forceinline__ void modify(const KernelParams& params, const WarpRows& rows,
                                         const Tile& tile, int lane, Scores& scores) const {
    const AttentionParams& p = params.attention;
    if (p.softcap > 0.0f) {
      const float inner = scale / p.softcap, outer = p.softcap * kLog2e;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[j][i] = outer * bounded_tanh(scores[j][i] * inner);
    } else {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[j][i] *= scale * kLog2e;
    }
    if (p.alibi_slopes == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_row + 8 * half >= rows.end) continue;
      const QueryRow row = query(params, rows, half);
      const float slope = p.alibi_slopes[row.head] * kLog2e;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          scores[j][i] += slope * static_cast<float>(key_of(tile, j, i, lane) - row.position);
    }
  }
};

}  // namespace pykvcache::cuda
