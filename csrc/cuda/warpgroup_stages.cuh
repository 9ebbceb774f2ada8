// What producer and consumers of wgmma_prefill.cuh share: shapes of tiles, the stages of K and V in
// shared memory, and the barriers that say who may touch them.
#pragma once

#include "cuda/query_tiles.cuh"
#include "cuda/warpgroup_softmax.cuh"
#include "cuda/warpgroup_tile.cuh"

namespace pykvcache::cuda {

constexpr int kSmallestBox = 16;  // keys of a block; smaller ones are gathered key by key

struct WarpgroupParams {
  KernelParams kernel;
  int32_t box_shift;  // a box is 1 << box_shift keys of one block; 0: keys are gathered
  TensorMap maps[2];  // of K and V, for boxes
};

enum class Side { kKeys, kValues };

template <int kDim>
struct WarpgroupStages {
  static constexpr int kConsumers = 2;
  static constexpr int kRows = kGroupRows * kConsumers;
  static constexpr int kTileShift = kDim <= 128 ? 7 : 6;
  static constexpr int kTileKeys = 1 << kTileShift;
  static constexpr int kStages = 2;

  using Queries = WarpgroupTile<kGroupRows, kDim>;  // of one consumer
  using Tile = WarpgroupTile<kTileKeys, kDim>;
  using Softmax = WarpgroupSoftmax<kTileKeys>;

  // Barriers of side and stage.
  struct Control {
    Barrier full[2][kStages];                   // the tile is there
    Barrier empty[2][kStages];                  // all warps of consumers are done with it
    Barrier last;                               // the copies of the last tile of V have landed
    uint32_t present[kStages][kTileKeys / 32];  // bit per key
  };
  static constexpr int kSharedBytes =
      kConsumers * Queries::kBytes + 2 * kStages * Tile::kBytes + static_cast<int>(sizeof(Control));

  // Which tiles of keys the CTA's rows see.
  struct Work {
    WarpRows rows;
    int32_t first;  // position of the first key
    int32_t count;  // of tiles
  };

  // The stage of tile i, and the parity of the barriers' phases that belong to it.
  struct Place {
    int stage;
    uint32_t parity;
    __device__ __forceinline__ explicit Place(int32_t i)
        : stage(i % kStages), parity(i / kStages % 2) {}
  };

  unsigned char* shared = dynamic_shared();

  __device__ __forceinline__ unsigned char* queries(int consumer) const {
    return shared + consumer * Queries::kBytes;
  }
  __device__ __forceinline__ unsigned char* tile(Side side, const Place& place) const {
    return shared + kConsumers * Queries::kBytes +
           (static_cast<int>(side) * kStages + place.stage) * Tile::kBytes;
  }
  __device__ __forceinline__ Control& control() const {
    return *reinterpret_cast<Control*>(shared + kConsumers * Queries::kBytes +
                                       2 * kStages * Tile::kBytes);
  }
  __device__ __forceinline__ Barrier* full(Side side, const Place& place) const {
    return &control().full[static_cast<int>(side)][place.stage];
  }
  __device__ __forceinline__ Barrier* empty(Side side, const Place& place) const {
    return &control().empty[static_cast<int>(side)][place.stage];
  }

  // By one thread, before the barrier of the CTA. `producers`: threads that complete a tile.
  __device__ __forceinline__ void initialise(int producers) const {
    for (int side = 0; side < 2; ++side)
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(&control().full[side][stage], producers);
        barrier_init(&control().empty[side][stage], kConsumers * kWarpgroup / 32);
      }
    barrier_init(&control().last, 1);
    barrier_init_fence();
  }
};

}  // namespace pykvcache::cuda
