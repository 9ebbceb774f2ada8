// What one warp does with a tile of keys, in decode and in prefill: 16 kRowTiles query rows against
// kKeys keys that lie in shared memory. FlashAttention-2's loop body (Dao, 2023) over m16n8k16.
//
// Lane (g = lane / 4, t = lane % 4) holds rows g and g + 8 of each row tile; the sum of a row is
// spread over its four lanes until finish().
#pragma once

#include "cuda/logits.cuh"
#include "cuda/shared_tile.cuh"
#include "cuda/unit.cuh"

namespace pykvcache::cuda {

// Keys in shared memory.
struct KeyTile {
  const unsigned char* keys;  // rows of K; values: rows of V
  const unsigned char* values;
  const float* key_scales;  // one a key, used if the scales are one a slot
  const float* value_scales;
  int32_t begin;     // position of the first
  uint32_t present;  // bit i: key begin + i is there
};

// T: what is multiplied. kHoldsQueries: q stays in registers, which must suffice.
template <class T, class KV, int kDim, int kRowTiles, bool kHoldsQueries>
struct WarpAttention {
  using Tile = SharedTile<T, KV, kDim>;
  static constexpr unsigned kAll = 0xffffffffu;

  static constexpr bool kHalves = __is_same(T, Half);  // weights are in kWeightUnit

  float values[kRowTiles][kDim / 8][4];
  SoftmaxState state[kRowTiles][2];
  float value_unit;  // of values, if slots have scales and T is Half
  uint32_t queries[kHoldsQueries ? kRowTiles : 1][kHoldsQueries ? kDim / 16 : 1][4];
  KeyRange common;  // keys that all of this lane's rows see

  __device__ __forceinline__ static int row_of(int m, int half, int lane) {
    return m * kRowTile + lane / 4 + 8 * half;
  }

  __device__ __forceinline__ void start(const KernelParams& params, const WarpRows& rows,
                                        int lane) {
    common = {0, INT32_MAX};
    value_unit = unit_of<-1>(0.0f);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int tile = 0; tile < kDim / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][tile][i] = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state[m][half] = SoftmaxState();
        const KeyRange range = visible(params, rows, rows.first + row_of(m, half, lane));
        if (range.begin > common.begin) common.begin = range.begin;
        if (range.end < common.end) common.end = range.end;
      }
    }
  }

  // A row that is not there sees everything: it must not make others compute masks.
  __device__ __forceinline__ static KeyRange visible(const KernelParams& params,
                                                     const WarpRows& rows, int row) {
    if (row >= rows.end) return {0, INT32_MAX};
    const QueryRow query = query_row(params, rows.sequence, rows.kv_head, row);
    return visible_keys(params.attention, rows.sequence, query.position);
  }

  // Takes the rows of this warp out of shared memory, which is free for others afterwards.
  __device__ __forceinline__ void hold_queries(const unsigned char* q, int lane) {
    static_assert(kHoldsQueries);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step)
        Tile::load_queries(q, m * kRowTile, step, lane, queries[m][step]);
  }

  // q: rows of this warp in shared memory, unless it holds them; units: of these rows, if KV is
  // Float8. `scale` holds the head's k_scale.
  template <int kKeys>
  __device__ __forceinline__ void attend(const KernelParams& params, const WarpRows& rows,
                                         const unsigned char* q, const float* units,
                                         const KeyTile& tile, float scale, int lane) {
    float scores[kRowTiles][kKeys / 8][4];
    multiply_queries<kKeys>(q, tile, lane, scores);
    float scales[kRowTiles][2];  // from products of rows to scores
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scales[m][half] = Tile::kFloat8 ? scale * units[row_of(m, half, lane)] : scale;
    if (has_plain_logits(params.attention))
      mask<kKeys>(params, rows, tile, scales, lane, scores);
    else
      modify<kKeys>(params, rows, tile, scales, lane, scores);
    weigh<kKeys>(params, tile, lane, scores);
    add_values<kKeys>(tile, lane, scores);
  }

  // Completes the sums of the rows, and takes units out. All lanes of a row then have the same
  // state.
  __device__ __forceinline__ void finish(const KernelParams& params) {
    const bool slot_scales = params.attention.v_scale.kind == ScaleKind::kSlot;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = state[m][half].sum;
        sum += __shfl_xor_sync(kAll, sum, 1);
        sum += __shfl_xor_sync(kAll, sum, 2);
        if constexpr (kHalves) {
          sum *= kWeightUnit;
          rescale(m, half, slot_scales ? kWeightUnit * value_unit : kWeightUnit);
        }
      }
  }

 private:
  template <int kKeys>
  __device__ __forceinline__ void multiply_queries(const unsigned char* q, const KeyTile& tile,
                                                   int lane,
                                                   float (&scores)[kRowTiles][kKeys / 8][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    uint32_t words[kKeys / 16][4];
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if constexpr (kHoldsQueries) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = queries[m][step][i];
        } else {
          Tile::load_queries(q, m * kRowTile, step, lane, a[m]);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        Tile::load_keys(tile.keys, n * 16, step, lane, words[n]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t low = Tile::key_word(words[n], step, i, 0);
          const uint32_t high = Tile::key_word(words[n], step, i, 1);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
            multiply_add<T>(scores[m][2 * n + i], a[m], low, high);
        }
      }
    }
  }

  // Column of score element i of n-tile n within the tile.
  __device__ __forceinline__ static int column_of(int n, int i, int lane) {
    return n * 8 + 2 * (lane % 4) + i % 2;
  }

  __device__ __forceinline__ static bool is_visible(const KeyRange& range, const KeyTile& tile,
                                                    int column) {
    const int32_t key = tile.begin + column;
    return key >= range.begin && key < range.end && (tile.present >> column & 1u);
  }

  // Scales, and hides keys; most tiles hide none.
  template <int kKeys>
  __device__ __forceinline__ void mask(const KernelParams& params, const WarpRows& rows,
                                       const KeyTile& tile, const float (&scales)[kRowTiles][2],
                                       int lane, float (&scores)[kRowTiles][kKeys / 8][4]) const {
    constexpr uint32_t kFull = kKeys == 32 ? ~0u : (1u << (kKeys % 32)) - 1;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] *= scales[m][i / 2] * kLog2e;
    if (tile.present == kFull && common.begin <= tile.begin && tile.begin + kKeys <= common.end)
      return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange range = visible(params, rows, rows.first + row_of(m, half, lane));
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            if (!is_visible(range, tile, column_of(n, i, lane))) scores[m][n][i] = kNothing;
      }
  }

  // The same with softcap, ALiBi, bias and scales of slots.
  template <int kKeys>
  __device__ __forceinline__ void modify(const KernelParams& params, const WarpRows& rows,
                                         const KeyTile& tile, const float (&scales)[kRowTiles][2],
                                         int lane, float (&scores)[kRowTiles][kKeys / 8][4]) const {
    const AttentionParams& p = params.attention;
    const bool slot_scales = p.k_scale.kind == ScaleKind::kSlot;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rows.first + row_of(m, half, lane);
        const QueryRow query = query_row(params, rows.sequence, rows.kv_head, row);
        const KeyRange range = visible(params, rows, row);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const int column = column_of(n, i, lane);
            float& score = scores[m][n][i];
            if (row < rows.end && is_visible(range, tile, column)) {
              const float scale = scales[m][half];
              const float own = slot_scales ? scale * tile.key_scales[column] : scale;
              score = modified_logit(p, rows.sequence, query, tile.begin + column, score * own);
            } else {
              score = kNothing;
            }
          }
      }
  }

  // Logits become weights; what was summed before is rescaled to the new maximum.
  template <int kKeys>
  __device__ __forceinline__ void weigh(const KernelParams& params, const KeyTile& tile, int lane,
                                        float (&scores)[kRowTiles][kKeys / 8][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = kNothing;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 2));
        const float factor = state[m][half].raise(top);
        const float base = state[m][half].base() + (kHalves ? kWeightExponent : 0);
        if (!__all_sync(kAll, factor == 1.0f)) rescale(m, half, factor);  // it rarely moves
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][n][i] = exp2_fast(scores[m][n][i] - base);
            state[m][half].sum += scores[m][n][i];
          }
      }
    if (params.attention.v_scale.kind == ScaleKind::kSlot) scale_weights<kKeys>(tile, lane, scores);
  }

  __device__ __forceinline__ void rescale(int m, int half, float factor) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      values[m][n][2 * half] *= factor;
      values[m][n][2 * half + 1] *= factor;
    }
  }

  // Weights of 0 stay: the scale of a key that is not seen may be anything.
  template <int kKeys>
  __device__ __forceinline__ void scale_weights(const KeyTile& tile, int lane,
                                                float (&weights)[kRowTiles][kKeys / 8][4]) {
    float scales[kKeys / 8][2];
    float largest = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < 2) scales[n][i] = tile.value_scales[column_of(n, i, lane)];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          if (weights[m][n][i] != 0.0f) largest = fmaxf(largest, fabsf(scales[n][i % 2]));
      }
    const float inverse = kHalves ? inverse_of(raise_unit(largest)) : 1.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          if (weights[m][n][i] != 0.0f) weights[m][n][i] *= scales[n][i % 2] * inverse;
  }

  // Makes the unit of values so large that weights times scales of slots, at most `largest` in this
  // lane, have room in halves; returns it.
  __device__ __forceinline__ float raise_unit(float largest) {
    // Numbers without a sign are in the order of their bits.
    largest = bits_float(__reduce_max_sync(kAll, float_bits(largest)));
    const float before = value_unit;
    value_unit = fmaxf(before, unit_of<-1>(largest));
    if (value_unit != before) {
      const float factor = before * inverse_of(value_unit);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) rescale(m, half, factor);
    }
    return value_unit;
  }

  template <int kKeys>
  __device__ __forceinline__ void add_values(const KeyTile& tile, int lane,
                                             const float (&weights)[kRowTiles][kKeys / 8][4]) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t a[kRowTiles][4];  // the layout of c in n-tiles 2n and 2n + 1 is that of a
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = pack<T>(weights[m][2 * n + i / 2][i % 2 * 2],
                            weights[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int pair = 0; pair < kDim / 32; ++pair) {
        uint32_t b[4][2];
        Tile::load_values(tile.values, n * 16, pair, lane, b);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
            multiply_add<T>(values[m][4 * pair + i], a[m], b[i][0], b[i][1]);
      }
    }
  }
};

}  // namespace pykvcache::cuda
