// What the decode kernel keeps besides numbers in registers: the tokens of a tile, the addresses of
// their rows, what to prefetch, and the scratch of one item.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/line.h"

namespace pykvcache::KV_ISA {

constexpr int64_t kTileBytes = 32 << 10;  // of K and V of one head, at most
constexpr int64_t kMaxTile = 64;          // tokens
constexpr int64_t kTokenGroup = 16;       // tiles are padded to this

alignas(64) static const char kZeroRow[(kMaxHeadDim + 16) * sizeof(float)] = {};

constexpr int64_t kPageBytes = 4096;

struct Tile {
  int64_t count = 0;
  int32_t positions[kMaxTile];
  int64_t k_offsets[kMaxTile];
  int64_t v_offsets[kMaxTile];
  int64_t num_pages = 0;
  int32_t pages[kMaxTile];  // tokens whose row is on another page than the row before
};

// Addresses of a tile's rows for one head; past the tile's count they point at zeros.
template <class T>
struct TileRows {
  const T* k[kMaxTile];
  const T* v[kMaxTile];
};

template <class T>
void prefetch_rows(const T* const* rows, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; d += Line<T>::kElems) __builtin_prefetch(rows[i] + d);
}

// The lines of some rows in the order of their addresses, prefetched a few at a time: neighbouring
// lines together cost the memory system less, and an even pace keeps it busy.
template <class T>
struct LineStream {
  const T* const* row;
  const T* const* end;
  int64_t dim;
  int64_t offset = 0;

  void prefetch(int lines) {
    for (int i = 0; i < lines && row < end; ++i) {
      __builtin_prefetch(*row + offset);
      offset += Line<T>::kElems;
      if (offset >= dim) {
        offset = 0;
        ++row;
      }
    }
  }
};

// Sizes and the carved-up scratch of one item; leading dimension [heads of the item].
template <class T>
struct Workspace {
  using Query = typename Line<T>::Query;
  using Prob = typename Line<T>::Prob;

  int64_t rows;        // query rows per KV head, padded for the row groups
  int64_t q_stride;    // D, padded to lines
  int64_t out_stride;  // Dv, padded to lines
  Query* queries;      // [heads, rows, q_stride]
  float* out;          // [heads, rows, out_stride], lines in accumulator order
  float* sums;         // [heads, rows, kWidth], lane-wise
  float* maxima;       // [heads, rows]
  float* scores;       // [rows, kMaxTile]
  Prob* probs;         // [rows, kMaxTile]
  int64_t bytes = 0;

  Workspace(const AttentionParams& p, int64_t heads, int64_t query_rows, void* scratch) {
    rows = round_up(query_rows, 4);
    q_stride = round_up(p.head_dim, Line<T>::kElems);
    out_stride = round_up(p.v_head_dim, Line<T>::kElems);
    auto* base = static_cast<char*>(scratch);
    queries = carve<Query>(base, heads * rows * q_stride);
    out = carve<float>(base, heads * rows * out_stride);
    sums = carve<float>(base, heads * rows * kWidth);
    maxima = carve<float>(base, heads * rows);
    scores = carve<float>(base, rows * kMaxTile);
    probs = carve<Prob>(base, rows * kMaxTile);
  }

 private:
  template <class U>
  U* carve(char* base, int64_t count) {
    U* at = reinterpret_cast<U*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return at;
  }
};

}  // namespace pykvcache::KV_ISA
