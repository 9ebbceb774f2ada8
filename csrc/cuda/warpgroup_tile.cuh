// Tiles in shared memory as boxes are copied to them and wgmma reads them: slabs of 64 columns,
// rows of 128 bytes, each 16-byte chunk's place exclusive-ored with the row modulo 8 (128-byte
// swizzle). The pattern follows address bits, so slabs begin at multiples of 1,024 bytes.
#pragma once

#include "cuda/hopper.cuh"

namespace pykvcache::cuda {

// A matrix in shared memory for wgmma, in 128-byte swizzle. `group_bytes`: from 8 rows of 128 bytes
// to the next 8; `slab_bytes`: from 64 columns to the next 64, where columns are an outer dimension
// of the product.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, int group_bytes,
                                                      int slab_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t address = shared_address(start) >> 4 & 0x3fff;
  return kSwizzle128 | static_cast<uint64_t>(group_bytes >> 4) << 32 |
         static_cast<uint64_t>(slab_bytes >> 4) << 16 | address;
}

template <int kTileRows, int kDim>
struct WarpgroupTile {
  static constexpr int kRowBytes = 2 * kBoxColumns;
  static constexpr int kGroupBytes = 8 * kRowBytes;
  static constexpr int kSlabs = kDim / kBoxColumns;
  static constexpr int kSlabBytes = kTileRows * kRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static_assert(kDim % kBoxColumns == 0 && kTileRows % 8 == 0);

  // Of 8 columns of a row; `chunk` counts over all slabs.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return chunk / 8 * kSlabBytes + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
  }

  // The tile for products that sum over columns; descriptor + column_step(i): columns 16i and on.
  __device__ __forceinline__ static uint64_t sum_columns(const unsigned char* tile) {
    return matrix_descriptor(tile, kGroupBytes, 16);  // slab_bytes is not used
  }
  __device__ __forceinline__ static constexpr uint64_t column_step(int step) {
    return (step / 4 * kSlabBytes + step % 4 * 32) >> 4;
  }

  // The tile for products that sum over rows; descriptor + row_step(i): rows 16i and on.
  __device__ __forceinline__ static uint64_t sum_rows(const unsigned char* tile) {
    return matrix_descriptor(tile, kGroupBytes, kSlabBytes);
  }
  __device__ __forceinline__ static constexpr uint64_t row_step(int step) {
    return step * 2 * kGroupBytes >> 4;
  }
};

}  // namespace pykvcache::cuda
