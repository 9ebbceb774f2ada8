// What the prefetching decode kernel reads and in which order: the steps of an item, located and
// prefetched ahead of their use.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/decode_state.h"
#include "cpu/kernels/line.h"
#include "cpu/kernels/paged.h"

namespace pykvcache::KV_ISA {

constexpr int64_t kMaxTile = 64;           // tokens
constexpr int64_t kStepBytes = 4 << 10;    // of K or V of one head over a tile, about
constexpr int64_t kAheadBytes = 12 << 10;  // how far prefetching runs ahead, at most
constexpr int64_t kPageBytes = 4 << 10;
// Of one step: a group of the longest rows, and more than kMaxTile short ones.
constexpr int64_t kMaxLines =
    kTokenGroup * kMaxHeadDim * static_cast<int64_t>(sizeof(float)) / kLineBytes;

constexpr int64_t kRing = 4;  // steps that are located, the current one included

KV_INLINE int64_t lines_of(int64_t row_bytes) { return (row_bytes + kLineBytes - 1) / kLineBytes; }

// Tile and stages for rows of so many bytes: what is asked for as far as there is room, else a tile
// of about kStepBytes, and as many stages as fit kAheadBytes.
// Not inlined: within the constructor it made gcc 12 compile the loops a tenth slower.
__attribute__((noinline)) static DecodeShape decode_shape_of(const Launch& launch,
                                                             int64_t row_bytes) {
  const int64_t room = min_of(kMaxTile, kMaxLines / lines_of(row_bytes));
  const int64_t wanted = launch.tile > 0 ? min_of(launch.tile, room) : kStepBytes / row_bytes;
  DecodeShape shape;
  shape.tile = max_of(kTokenGroup, min_of(kMaxTile, wanted / kTokenGroup * kTokenGroup));
  const int64_t ahead = launch.stages > 0 ? launch.stages : kAheadBytes / (shape.tile * row_bytes);
  shape.stages = max_of<int64_t>(1, min_of(kRing - 1, ahead));
  return shape;
}

alignas(64) static const char kZeroRow[(kMaxHeadDim + 16) * sizeof(float)] = {};

// K or V of one head over the tokens of a tile.
template <class T>
struct Step {
  const Tile* tile;
  const T* rows[kMaxTile];       // past the tile's count they point at zeros
  const char* lines[kMaxLines];  // of the rows, each once and in their order; then zeros
};

// Two lists of lines to prefetch: for the first time and again.
struct LinesAhead {
  const char* const* far;
  const char* const* near;

  LinesAhead skip(int64_t count) const { return {far + count, near + count}; }

  template <int kCount>
  inline __attribute__((always_inline)) void prefetch() {
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(*far++);
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(*near++);
  }
};

// The steps of an item in the order of memory: K of every head over a tile, then V of every head.
// For every line that is used two are prefetched: one some steps ahead, and one of the next step
// for the second time, because processors drop prefetches when too many loads are under way.
template <class T>
class StepQueue {
 public:
  StepQueue(const AttentionParams& p, const AttentionItem& item)
      : p_(p), item_(item), cursor_(p, item.row, item.kv_begin, item.kv_end) {
    const int64_t row_bytes = max_of(p.head_dim, p.v_head_dim) * static_cast<int64_t>(sizeof(T));
    const DecodeShape shape = decode_shape_of(p.launch, row_bytes);
    tile_tokens_ = shape.tile;
    ahead_ = shape.stages;
    max_lines_ = tile_tokens_ * lines_of(row_bytes);
    take_tile(tiles_[0]);
    for (int64_t i = 0; i <= ahead_; ++i) locate();
    for (int64_t i = 0; i < ahead_; ++i)
      for (int64_t line = 0; line < max_lines_; ++line) __builtin_prefetch(steps_[i].lines[line]);
  }

  const Step<T>& current() const { return steps_[done_ % kRing]; }

  // To prefetch while the current step is computed; each has as many lines as any step, or more.
  LinesAhead lines_ahead() const {
    return {steps_[(done_ + ahead_) % kRing].lines, steps_[(done_ + 1) % kRing].lines};
  }

  void advance() {
    ++done_;
    locate();
  }

 private:
  static constexpr int64_t kTiles =
      4;  // that kRing steps can be of, at two or more a tile, and one

  void locate() {
    const int64_t heads = item_.head_end - item_.head_begin;
    if (phase_ == 0) take_tile(tiles_[++tile_ % kTiles]);
    const Tile& tile = tiles_[(tile_ - 1) % kTiles];
    Step<T>& step = steps_[located_++ % kRing];
    step.tile = &tile;
    if (phase_ < heads)
      locate(step, tile.k, head_base<T>(p_.k, item_.head_begin + phase_), p_.head_dim);
    else
      locate(step, tile.v, head_base<T>(p_.v, item_.head_begin + phase_ - heads), p_.v_head_dim);
    if (++phase_ == 2 * heads) phase_ = 0;
  }

  void take_tile(Tile& tile) {
    tile.count = cursor_.take(tile_tokens_, tile.positions, tile.k.offsets, tile.v.offsets);
    tile.k.find_runs(tile.count, p_.head_dim);
    tile.v.find_runs(tile.count, p_.v_head_dim);
    fetch_page_entries<T>(tile, item_, p_);
    if constexpr (Line<T>::kScaled) {
      locate_scales(tile, tile.k, p_.k_scale, p_, item_);
      locate_scales(tile, tile.v, p_.v_scale, p_, item_);
    }
  }

  // Also starts the page walks, so that they are done when the lines are prefetched.
  void locate(Step<T>& step, const TileSide& side, const T* base, int64_t dim) const {
    const int64_t count = step.tile->count;
    for (int64_t t = 0; t < count; ++t) step.rows[t] = base + side.offsets[t];
    for (int64_t t = count; t < tile_tokens_; ++t)
      step.rows[t] = reinterpret_cast<const T*>(kZeroRow);

    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
    int64_t lines = 0;
    for (int64_t t = 0; t < count; t = side.run_ends[t]) {
      const auto* run = reinterpret_cast<const char*>(step.rows[t]);
      const int64_t bytes = (side.run_ends[t] - t) * row_bytes;
      for (int64_t at = 0; at < bytes; at += kLineBytes) step.lines[lines++] = run + at;
      for (int64_t at = 0; at < bytes; at += kPageBytes) __builtin_prefetch(run + at);
    }
    while (lines < max_lines_) step.lines[lines++] = kZeroRow;
  }

  const AttentionParams& p_;
  const AttentionItem& item_;
  TokenCursor cursor_;
  int64_t tile_tokens_;
  int64_t max_lines_;  // of a step
  int64_t ahead_;      // steps
  int64_t phase_ = 0;  // of the next step to locate: K of all heads, then V of all heads
  uint64_t tile_ = 0, located_ = 0, done_ = 0;
  Tile tiles_[kTiles];
  Step<T> steps_[kRing];
};

}  // namespace pykvcache::KV_ISA
