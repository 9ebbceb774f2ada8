// The producer of wgmma_prefill.cuh: one warp that copies tiles of K and V as boxes of one block
// and 64 dims each. Each lane has one of the boxes of a tile. Block ids are fetched a tile
// ahead: the copies would wait for them otherwise.
#pragma once

#include "cuda/warpgroup_stages.cuh"

namespace pykvcache::cuda {

template <int kDim>
struct BoxCopier {
  using Stages = WarpgroupStages<kDim>;
  using Tile = typename Stages::Tile;
  using Place = typename Stages::Place;
  using Work = typename Stages::Work;
  static constexpr int kTileKeys = Stages::kTileKeys;
  static_assert(kTileKeys / 16 * Tile::kSlabs <= 32);

  Stages stages;
  const WarpgroupParams& params;
  int lane = threadIdx.x % 32;
  int shift = params.box_shift;
  int box = lane & ((kTileKeys >> shift) - 1);
  int slab = lane >> (Stages::kTileShift - shift);

  __device__ __forceinline__ void copy(const Work& work) const {
    if (lane < 2) prefetch_map(&params.maps[lane]);
    const Sequence& sequence = work.rows.sequence;
    const Divisor& block_size = params.kernel.block_size;
    int32_t position = work.first + (box << shift);
    BlockSlot next = sequence.locate(block_size, position);
    for (int32_t i = 0; i < work.count; ++i) {
      const BlockSlot place = next;
      position += kTileKeys;
      next = sequence.locate(block_size, position);
      const uint32_t there = __ballot_sync(0xffffffffu, place.block >= 0);
      fill(work, Side::kKeys, i, place, there);
      fill(work, Side::kValues, i, place, there);
    }
  }

  __device__ __forceinline__ void fill(const Work& work, Side side, int32_t i,
                                       const BlockSlot& from, uint32_t there) const {
    const Place place(i);
    const int32_t end = work.first + (i + 1) * kTileKeys, kv_len = work.rows.sequence.kv_len;
    const bool cut = side == Side::kValues && kv_len < end && kv_len % (1 << shift) != 0;
    Barrier* const full = stages.full(side, place);
    Barrier* const landed = cut ? &stages.control().last : full;
    unsigned char* const to = stages.tile(side, place);
    // All consumers have read what the stage held.
    KV_OMITTABLE(wgmma_empty_wait, barrier_wait(stages.empty(side, place), place.parity ^ 1));
    if (lane == 0) {
      if (side == Side::kKeys) note_present(stages.control().present[place.stage], there);
      barrier_arrive_expecting(landed, Tile::kBytes);
    }
    if (slab < Tile::kSlabs)
      copy_box(to + slab * Tile::kSlabBytes + (box << shift) * Tile::kRowBytes,
               &params.maps[static_cast<int>(side)], landed, slab * kBoxColumns, from.slot,
               work.rows.kv_head, from.block);
    if (!cut) return;
    // The copies must not come after the zeros.
    KV_OMITTABLE(wgmma_last_wait, barrier_wait(&stages.control().last, 0));
    clear_past_end(to, kTileKeys - (end - kv_len));
    async_proxy_fence();
    // All lanes have written their zeros.
    KV_OMITTABLE(wgmma_zeros_barrier, __syncwarp());
    if (lane == 0) barrier_arrive(full);
  }

  // there: bit per box.
  __device__ __forceinline__ void note_present(uint32_t (&words)[kTileKeys / 32],
                                               uint32_t there) const {
#pragma unroll
    for (int i = 0; i < kTileKeys / 32; ++i) {
      const uint32_t low = there >> ((32 * i) >> shift) & 1u;
      const uint32_t high = there >> ((32 * i + 16) >> shift) & 1u;
      words[i] = low * 0xffffu | high * 0xffff0000u;
    }
  }

  // Slots past the end of the sequence, in its last block, may hold anything, and 0 * NaN is NaN.
  // Blocks past the end, and holes, came as zeros. `row`: of the tile, the first past the end.
  __device__ __forceinline__ void clear_past_end(unsigned char* to, int row) const {
    const int end = (((row - 1) >> shift) + 1) << shift;
    const uint4 zeros = {0, 0, 0, 0};
    for (int i = lane; i < (end - row) * (kDim / 8); i += 32)
      *reinterpret_cast<uint4*>(to + Tile::offset(row + i / (kDim / 8), i % (kDim / 8))) = zeros;
  }
};

}  // namespace pykvcache::cuda
