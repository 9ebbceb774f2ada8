// Sizes of prefill's work: how many queries an item takes, and what it keeps in scratch memory.
// All are functions of the layer's shape alone, so that a row's results depend on no other row of
// the batch. Read next: prefill.cpp.
#pragma once

#include "cpu/kernels/pack.h"
#include "cpu/kernels/panel.h"
#include "params.h"

namespace pykvcache::KV_ISA {

// Query rows (tokens times heads of the KV head) that pass over the keys together: the more, the
// less packing weighs; queries and sums must stay in the L2 cache.
constexpr int64_t kQueryRows = 512;
constexpr int64_t kWideQueryRows = 256;

KV_INLINE int64_t queries_per_item(const AttentionParams& p) {
  int64_t rows = p.head_dim + p.v_head_dim <= 256 ? kQueryRows : kWideQueryRows;
  if (p.launch.rows > 0) rows = p.launch.rows;
  return max_of<int64_t>(1, rows * p.num_kv_heads / p.num_heads);
}

// Whether words are pairs of bf16: rounding K, V and the weights to it is as exact as the inputs.
KV_INLINE bool uses_bf16_words([[maybe_unused]] const AttentionParams& p) {
#ifdef __AVX512BF16__
  const auto fits = [](DType dtype) {
    return dtype == DType::kBFloat16 || dtype == DType::kFloat8E4M3;
  };
  return p.q_dtype == DType::kBFloat16 && fits(p.k.dtype) && fits(p.v.dtype);
#else
  return false;
#endif
}

struct Layout {
  int64_t steps;         // words of a row of K or of q
  int64_t tile_tokens;   // tokens of a tile
  int64_t key_stride;    // keys [tile_tokens][key_stride]
  int64_t value_stride;  // values [kTileSteps][value_stride]
  int64_t out_rows;      // of a panel's out [out_rows][kPanel]
  int64_t num_panels;

  explicit Layout(const AttentionParams& p) {
    const int64_t pack = uses_bf16_words(p) ? 2 : 1;
    steps = ceil_div(p.head_dim, pack);
    tile_tokens = kTileSteps * pack;
    key_stride = round_up(steps, kWidth) + kRowGap;
    value_stride = round_up(p.v_head_dim, kMaxTileRows) + kRowGap;
    out_rows = round_up(p.v_head_dim, max_of(kWidth, kMaxTileRows));
    num_panels = ceil_div(queries_per_item(p) * (p.num_heads / p.num_kv_heads), kPanel);
  }

  int64_t bytes() const {
    const int64_t words = tile_tokens * (key_stride + kPanel) + kTileSteps * value_stride +
                          kWidth * staging_stride() + num_panels * panel_words();
    return kAlignment + panels_bytes() + words * static_cast<int64_t>(sizeof(float));
  }
  int64_t staging_stride() const { return max_of(key_stride, out_rows); }
  int64_t panel_words() const { return kPanel * (steps + out_rows + 4); }
  int64_t panels_bytes() const {
    return round_up(num_panels * static_cast<int64_t>(sizeof(Panel)), kAlignment);
  }

  static constexpr int64_t kAlignment = 64;
};

// The parts of an item's scratch memory.
struct Scratch {
  Panel* panels;       // [num_panels]
  float* keys;         // [tile_tokens][key_stride]
  float* values;       // [kTileSteps][value_stride]
  float* scores;       // [tile_tokens][kPanel]
  float* staging;      // [kWidth][staging_stride]
  float* panel_words;  // [num_panels][panel_words]

  Scratch(const Layout& layout, void* memory) {
    char* aligned = static_cast<char*>(memory);
    aligned += -reinterpret_cast<uintptr_t>(aligned) % Layout::kAlignment;
    panels = reinterpret_cast<Panel*>(aligned);
    keys = reinterpret_cast<float*>(aligned + layout.panels_bytes());
    values = keys + layout.tile_tokens * layout.key_stride;
    scores = values + kTileSteps * layout.value_stride;
    staging = scores + layout.tile_tokens * kPanel;
    panel_words = staging + kWidth * layout.staging_stride();
  }
};

}  // namespace pykvcache::KV_ISA
