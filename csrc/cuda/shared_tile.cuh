// Tiles in shared memory: rows of K, V or q in 16-byte chunks, and the fragments read from them.
//
// A chunk's place in its row is exclusive-ored with the row, so that the eight rows that one
// load_matrices phase reads at one chunk lie in different banks.
//
// Float8 is turned into halves in registers, and T is Half then, whatever q's dtype is. One 8x8
// matrix of 2-byte elements holds 16 dims of a Float8 row: lane t gets dims 4t to 4t + 3, where two
// of T's matrices would give it 2t, 2t + 1, 2t + 8 and 2t + 9. The order of dims is free as long as
// q has the same (swizzled_word) and the output is read in it (value_dim).
#pragma once

#include "cuda/ptx.cuh"

namespace pykvcache::cuda {

constexpr int kChunk = 16;  // bytes

// What the offset of a chunk within its row is exclusive-ored with. Of two numbers without a common
// bit it is the exclusive or of both.
template <int kRowBytes>
__device__ __forceinline__ int chunk_flip(int row) {
  constexpr int kChunks = kRowBytes / kChunk;
  static_assert(kChunks >= 4 && (kChunks & (kChunks - 1)) == 0);
  return (kChunks >= 8 ? row & 7 : (row >> 1) & 3) * kChunk;
}

template <int kRowBytes>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kRowBytes + (chunk * kChunk ^ chunk_flip<kRowBytes>(row));
}

template <class T, class KV, int kDim>
struct SharedTile {
  static constexpr bool kFloat8 = sizeof(KV) == 1;
  static constexpr int kQueryBytes = kDim * static_cast<int>(sizeof(T));  // of a row
  static constexpr int kCacheBytes = kDim * static_cast<int>(sizeof(KV));
  static_assert(kDim % 32 == 0 && (!kFloat8 || __is_same(T, Half)));

  // Where word i of the 8 words (16 dims) of q lies within them.
  __device__ static __forceinline__ int swizzled_word(int i) {
    return kFloat8 ? i / 2 + i % 2 * 4 : i;
  }

  // The dim of element `column` (0 or 1) of this lane in n-tile `tile` of the output.
  __device__ static __forceinline__ int value_dim(int tile, int lane, int column) {
    const int t = lane % 4;
    return kFloat8 ? tile / 2 * 16 + 4 * t + 2 * column + tile % 2 : tile * 8 + 2 * t + column;
  }

  // A operand: q rows [16] from `row`, dims 16 * step and on.
  __device__ static __forceinline__ void load_queries(const unsigned char* q, int row, int step,
                                                      int lane, uint32_t (&a)[4]) {
    load_matrices(q + chunk_offset<kQueryBytes>(row + lane % 16, 2 * step + lane / 16), a);
  }

  // K of 16 keys from `row`, dims of step `step`. A Float8 load holds two steps: it is made for
  // even ones only.
  __device__ static __forceinline__ void load_keys(const unsigned char* k, int row, int step,
                                                   int lane, uint32_t (&words)[4]) {
    if constexpr (kFloat8) {
      if (step % 2 == 0)
        load_matrices(k + chunk_offset<kCacheBytes>(row + lane % 16, step + lane / 16), words);
    } else {
      load_matrices(
          k + chunk_offset<kCacheBytes>(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2),
          words);
    }
  }

  // B operand of q k^T from what load_keys got: n-tile i (0 or 1) of the 16 keys, word w.
  __device__ static __forceinline__ uint32_t key_word(const uint32_t (&words)[4], int step, int i,
                                                      int w) {
    if constexpr (kFloat8)
      return unpack_float8(words[step % 2 * 2 + i] >> (16 * w) & 0xffff);
    else
      return words[2 * i + w];
  }

  // B operands of p v: keys [16] from `row`, output n-tiles 4 * pair to 4 * pair + 3,
  // b[n-tile][word].
  __device__ static __forceinline__ void load_values(const unsigned char* v, int row, int pair,
                                                     int lane, uint32_t (&b)[4][2]) {
    uint32_t w[4];
    if constexpr (kFloat8) {
      load_matrices_transposed(v + chunk_offset<kCacheBytes>(row + lane % 16, 2 * pair + lane / 16),
                               w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // bytes 0 and 2: an even dim of two keys; 1 and 3: an odd one
        b[i / 2 * 2][i % 2] = unpack_float8(byte_permute(w[i], 0, 0x4420));
        b[i / 2 * 2 + 1][i % 2] = unpack_float8(byte_permute(w[i], 0, 0x4431));
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_matrices_transposed(
            v + chunk_offset<kCacheBytes>(row + lane % 16, 4 * pair + 2 * half + lane / 16), w);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[2 * half + i / 2][i % 2] = w[i];
      }
    }
  }
};

}  // namespace pykvcache::cuda
