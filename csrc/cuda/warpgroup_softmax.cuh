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
  static constexpr int kPresenceKeys = 16;  // keys that are there, or not, together
  static constexpr uint32_t kAllPresent = (1u << (kKeys / kPresenceKeys)) - 1;

  // The keys that the scores belong to.
  struct Tile {
    int32_t begin;     // position of the first
    uint32_t present;  // bit i: keys begin + 16 i and on are there
  };

  SoftmaxState state[2];
  KeyRange range[2];  // of the two rows
  KeyRange common;    // keys that both see
  int32_t row[2];     // of the sequence
  float scale;        // of scores, with the k_scale of the head

  // `first`: the first of this lane's two rows.
  __device__ __forceinline__ void start(const KernelParams& params, const WarpRows& rows,
                                        int32_t first) {
    const AttentionParams& p = params.attention;
    scale = p.scale * head_scale(p.k_scale, rows.kv_head);
    common = {0, INT32_MAX};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state[half] = SoftmaxState();
      row[half] = first + 8 * half;
      range[half] = {0, INT32_MAX};  // a row that is not there must not make others compute masks
      if (row[half] >= rows.end) continue;
      const QueryRow query = query_row(params, rows.sequence, rows.kv_head, row[half]);
      range[half] = visible_keys(p, rows.sequence, query.position);
      if (range[half].begin > common.begin) common.begin = range[half].begin;
      if (range[half].end < common.end) common.end = range[half].end;
    }
  }

  // Scores become weights. What was summed before must be multiplied by `factors`.
  __device__ __forceinline__ void weigh(const KernelParams& params, const WarpRows& rows,
                                        const Tile& tile, int lane, Scores& scores,
                                        float (&factors)[2]) {
    float to_logit = scale * kLog2e;
    if (has_plain_logits(params.attention) && to_logit > 0.0f) {
      hide(tile, lane, scores);
    } else {
      modify(params, rows, tile, lane, scores);
      to_logit = 1.0f;
    }
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
  __device__ __forceinline__ bool sees(int half, const Tile& tile, int j, int i, int lane) const {
    const int32_t key = tile.begin + 8 * j + 2 * (lane % 4) + i % 2;
    return key >= range[half].begin && key < range[half].end &&
           (tile.present >> (8 * j / kPresenceKeys) & 1u);
  }

  // Most tiles hide nothing.
  __device__ __forceinline__ void hide(const Tile& tile, int lane, Scores& scores) const {
    if (tile.present == kAllPresent && common.begin <= tile.begin &&
        tile.begin + kKeys <= common.end)
      return;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!sees(i / 2, tile, j, i, lane)) scores[j][i] = kNothing;
  }

  // Logits in base 2, with softcap, ALiBi and bias.
  __device__ __forceinline__ void modify(const KernelParams& params, const WarpRows& rows,
                                         const Tile& tile, int lane, Scores& scores) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryRow query = query_row(params, rows.sequence, rows.kv_head, row[half]);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int32_t key = tile.begin + 8 * j + 2 * (lane % 4) + i % 2;
          if (row[half] < rows.end && sees(half, tile, j, i, lane))
            scores[j][i] =
                modified_logit(params.attention, rows.sequence, query, key, scores[j][i] * scale);
          else
            scores[j][i] = kNothing;
        }
    }
  }
};

}  // namespace pykvcache::cuda
