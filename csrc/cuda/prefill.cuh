// Prefill: sequences with many query rows, one CTA for each tile of them, keys not split.
// FlashAttention-2 (Dao, 2023) over blocks. A CTA is 4 warps of 16 kRowTiles query rows each; which
// rows, says query_tiles.cuh.
//
// K and V go through a ring of kStages stages of kTileKeys keys that all warps share; each warp
// copies 16 keys of a stage. Read first: warp_attention.cuh, key_copy.cuh.
#pragma once

#include "cuda/key_copy.cuh"
#include "cuda/plan.cuh"
#include "cuda/query_tiles.cuh"

namespace pykvcache::cuda {

template <class T, class KV, int kDim>
struct Prefill {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kRows = kWarps * kRowTile * kRowTiles;
  static constexpr int kTileKeys = kDim <= 128 ? 64 : 32;
  // Keys that a warp takes at once, for which q is read once: with 32, Float8 of kDim 128 spills
  // registers on sm_100.
  static constexpr int kStepKeys = kDim == 128 && sizeof(KV) == 1 ? 16 : 32;
  static constexpr int kStages = kDim <= 64 ? 3 : 2;

  using Stage = KeyStage<KV, kDim, kTileKeys>;
  using Attention = WarpAttention<T, KV, kDim, kRowTiles, false>;
  using Tile = SharedTile<T, KV, kDim>;
  using Tiles = QueryTiles<kRows>;
  static_assert(Stage::kGroups <= kWarps);

  // Shared memory: q, units of its rows, the stages, what belongs to the stages.
  static constexpr int kQueryBytes = kRows * Tile::kQueryBytes;
  static constexpr int kUnitBytes = Tile::kFloat8 ? kRows * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kSharedBytes =
      kQueryBytes + kUnitBytes +
      kStages * (Stage::kRowsBytes + static_cast<int>(sizeof(typename Stage::Extras)));

  unsigned char* shared = dynamic_shared();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;

  __device__ __forceinline__ float* query_units() const {  // [kRows]
    return reinterpret_cast<float*>(shared + kQueryBytes);
  }
  __device__ __forceinline__ Stage stage(int index) const {
    unsigned char* stages = shared + kQueryBytes + kUnitBytes;
    auto* extras = reinterpret_cast<typename Stage::Extras*>(stages + kStages * Stage::kRowsBytes);
    return {stages + index * Stage::kRowsBytes, extras + index};
  }

  __device__ __forceinline__ void run(const KernelParams& params) const {
    WarpRows rows;
    if (!Tiles::find(params, rows)) return;
    stage_queries<T, KV, kDim>(params, rows, kRows, shared, query_units());
    const KeyRange keys = Tiles::keys(params, rows);
    rows.first += warp * kRowTile * kRowTiles;
    Attention attention;
    attention.start(params, rows, lane);
    walk(params, rows, keys, attention);
    attention.finish(params);
    if (Tile::kFloat8 && params.attention.q_dtype == DType::kBFloat16)
      write<BFloat16>(params, rows, attention);
    else
      write<T>(params, rows, attention);
  }

  __device__ __forceinline__ void walk(const KernelParams& params, const WarpRows& rows,
                                       const KeyRange& keys, Attention& attention) const {
    const int32_t first = keys.begin / kTileKeys * kTileKeys;
    const int32_t count = keys.end > first ? (keys.end - first + kTileKeys - 1) / kTileKeys : 0;
    const float scale = params.attention.scale * head_scale(params.attention.k_scale, rows.kv_head);
    const float* units = query_units() + warp * kRowTile * kRowTiles;
    const unsigned char* q = shared + warp * kRowTile * kRowTiles * Tile::kQueryBytes;
    KeyCopier<KV, kDim> copier(params, lane);
    copier.start(rows.sequence, rows.kv_head, first + warp * kGroupKeys, kTileKeys);
    const auto copy = [&](int32_t i, int into) {
      if (i < count && warp < Stage::kGroups) copier.copy(stage(into), warp);
      copy_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) copy(i, i);
    int current = 0, refilled = kStages - 1;
    for (int32_t i = 0; i < count; ++i) {
      // This thread's part of tile i is there;
      KV_OMITTABLE(prefill_wait, copy_wait<kStages - 2>());
      // so are all parts, and q; and all have read the stage that is refilled now.
      KV_OMITTABLE(prefill_barrier, __syncthreads());
      copy(i + kStages - 1, refilled);
#pragma unroll 1
      for (int step = 0; step < kTileKeys / kStepKeys; ++step) {
        const KeyTile tile =
            stage(current).tile(first + i * kTileKeys + step * kStepKeys,
                                step * (kStepKeys / kGroupKeys), kStepKeys / kGroupKeys);
        attention.template attend<kStepKeys>(params, rows, q, units, tile, scale, lane);
      }
      refilled = current;
      current = current + 1 == kStages ? 0 : current + 1;
    }
    copy_wait<0>();
  }

  template <class Out>
  __device__ __forceinline__ void write(const KernelParams& params, const WarpRows& rows,
                                        Attention& attention) const {
    const AttentionParams& p = params.attention;
    const float value_scale = head_scale(p.v_scale, rows.kv_head);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = rows.first + Attention::row_of(m, half, lane);
        if (row >= rows.end) continue;
        const QueryRow query = query_row(params, rows.sequence, rows.kv_head, row);
        const int64_t place = output_place(p, rows.sequence, query);
        SoftmaxState& state = attention.state[m][half];
        const float rescale = p.sinks != nullptr ? state.add_sink(p.sinks[query.head]) : 1.0f;
        const float factor = state.normalizer() * rescale * value_scale;
        Out* out = static_cast<Out*>(p.out) + place * p.v_head_dim;
#pragma unroll
        for (int tile = 0; tile < kDim / 8; ++tile)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int d = Tile::value_dim(tile, lane, c);
            if (d < p.v_head_dim)
              out[d] = from_float<Out>(attention.values[m][tile][2 * half + c] * factor);
          }
        if (lane % 4 == 0) p.lse[place] = state.lse();
      }
  }
};

}  // namespace pykvcache::cuda
