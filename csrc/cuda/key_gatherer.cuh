// The producer of wgmma_prefill.cuh for blocks that are too small for boxes: its four warps gather
// keys by cp.async, in chunks of 16 bytes, into the layout of boxes. A lane finds the address of a
// key, those that copy its chunks get it by a shuffle; block ids are fetched a tile ahead. Keys
// that are not there, and dims past the head's, are zeros.
#pragma once

#include "cuda/warpgroup_stages.cuh"

namespace pykvcache::cuda {

template <int kDim>
struct KeyGatherer {
  using Stages = WarpgroupStages<kDim>;
  using Tile = typename Stages::Tile;
  using Place = typename Stages::Place;
  using Work = typename Stages::Work;
  static constexpr unsigned kAll = 0xffffffffu;
  static constexpr int kTileKeys = Stages::kTileKeys;
  static constexpr int kWarpKeys = kTileKeys / 4;  // that a warp copies of a tile
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRowsAtOnce = 32 / kChunks;
  static_assert(kWarpKeys % 16 == 0 && kWarpKeys <= 32 && kRowsAtOnce >= 1);

  Stages stages;
  const KernelParams& params;
  int lane = threadIdx.x % 32;
  int first_key = threadIdx.x % kWarpgroup / 32 * kWarpKeys;  // of this warp, in a tile

  __device__ __forceinline__ void copy(const Work& work) const {
    const Sequence& sequence = work.rows.sequence;
    int32_t position = work.first + first_key + lane % kWarpKeys;
    BlockSlot next = sequence.locate(params.block_size, position);
    for (int32_t i = 0; i < work.count; ++i) {
      const BlockSlot place = next;
      position += kTileKeys;
      next = sequence.locate(params.block_size, position);
      fill(work, Side::kKeys, i, place);
      if (i > 0) complete<1>(Side::kValues, i - 1);
      fill(work, Side::kValues, i, place);
      complete<1>(Side::kKeys, i);
    }
    if (work.count > 0) complete<0>(Side::kValues, work.count - 1);
  }

  __device__ __forceinline__ void fill(const Work& work, Side side, int32_t i,
                                       const BlockSlot& from) const {
    const AttentionParams& p = params.attention;
    const CacheView& cache = side == Side::kKeys ? p.k : p.v;
    const int64_t dim = side == Side::kKeys ? p.head_dim : p.v_head_dim;
    const Place place(i);
    const int64_t mine =
        from.block < 0 ? -1 : cache_offset(cache, from.block, work.rows.kv_head, from.slot);
    const uint32_t present = __ballot_sync(kAll, from.block >= 0);
    // All consumers have read what the stage held.
    KV_OMITTABLE(gather_empty_wait, barrier_wait(stages.empty(side, place), place.parity ^ 1));
    if (side == Side::kKeys && lane == 0) {
      // Two warps share a word if they copy 16 keys each.
      auto* words = reinterpret_cast<unsigned char*>(stages.control().present[place.stage]);
      __builtin_memcpy(words + first_key / 8, &present, kWarpKeys / 8);
    }
    const auto* base = static_cast<const uint16_t*>(cache.data);
    const int chunk = lane % kChunks;
#pragma unroll 4
    for (int i = 0; i < kWarpKeys; i += kRowsAtOnce) {
      const int key = i + lane / kChunks;
      const int64_t offset = __shfl_sync(kAll, mine, key);
      const bool real = offset >= 0 && chunk * 8 < dim;
      copy_async_16(stages.tile(side, place) + Tile::offset(first_key + key, chunk),
                    base + (real ? offset + chunk * 8 : 0), real);
    }
    copy_commit();
  }

  // Tile i of a side has been copied; kPending fills have begun after it.
  template <int kPending>
  __device__ __forceinline__ void complete(Side side, int32_t i) const {
    // This thread's chunks are there.
    KV_OMITTABLE(gather_wait, copy_wait<kPending>());
    async_proxy_fence();
    barrier_arrive(stages.full(side, Place(i)));
  }
};

}  // namespace pykvcache::cuda
