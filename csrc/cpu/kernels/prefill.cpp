// Attention of a few queries of one KV head, with any option of the contract and at any query length:
// query tokens times the G query heads of the KV head are rows, rows are lanes of panels (panel.h),
// and the keys they see pass by in tiles under an online softmax. Read gemm.h and panel.h first.
#include "cpu/kernels.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/panel.h"
#include "cpu/visible.h"

namespace pykvcache::KV_ISA {
namespace {

constexpr int64_t kQueryRows = 256;
constexpr int64_t kAlignment = 64;

// A function of the layer's shape alone, so that a row's results depend on no other row of the
// batch. Wide heads take fewer rows to stay in the L2 cache.
int64_t queries_per_item(const AttentionParams& p) {
  const int64_t rows = p.head_dim + p.v_head_dim <= 256 ? kQueryRows : kQueryRows / 2;
  return max_of<int64_t>(1, rows * p.num_kv_heads / p.num_heads);
}

// Scratch memory of an item, in words.
struct Layout {
  int64_t steps;         // words of a row of K or of q
  int64_t tile_tokens;   // tokens of a tile
  int64_t key_stride;    // keys [tile_tokens][key_stride]
  int64_t value_stride;  // values [kTileSteps][value_stride]
  int64_t out_rows;      // of a panel's out [out_rows][kPanel]
  int64_t panels;

  Layout(const AttentionParams& p, int64_t pack)
      : steps(ceil_div(p.head_dim, pack)),
        tile_tokens(kTileSteps * pack),
        key_stride(round_up(steps, kWidth) + kRowGap),
        value_stride(round_up(p.v_head_dim, kMaxTileRows) + kRowGap),
        out_rows(round_up(p.v_head_dim, max_of(kWidth, kMaxTileRows))),
        panels(ceil_div(queries_per_item(p) * (p.num_heads / p.num_kv_heads), kPanel)) {}

  int64_t staging_stride() const { return max_of(key_stride, out_rows); }
  int64_t panel_words() const { return kPanel * (steps + out_rows + 4); }
  int64_t words() const {
    return tile_tokens * (key_stride + kPanel) + kTileSteps * value_stride +
           kWidth * staging_stride() + panels * panel_words();
  }
};

// The panels of one item and the tile of tokens that passes by.
template <class Words>
class QueryTile {
 public:
  QueryTile(const AttentionParams& p, const AttentionItem& item, Panel* panels, float* scratch);
  void run();

 private:
  using Element = typename Words::Element;

  int64_t query_of(int64_t row) const { return item_.q_begin + row / group_; }
  int64_t head_of(int64_t row) const { return item_.head_begin * group_ + row % group_; }
  int64_t position_of(int64_t row) const { return seq_len_ - q_len_ + query_of(row); }
  int64_t rows_of(const Panel& panel) const {
    return min_of<int64_t>(kPanel, rows_ - panel.first_row);
  }
  Side side(const CacheView& cache, const ScaleView& scale, int64_t width) const {
    const int32_t* blocks = p_.block_table + item_.row * p_.block_table_stride;
    return {cache, scale, blocks, p_.block_size, item_.head_begin, width};
  }

  void place_panel(Panel& panel, int64_t index, float* words);
  void load_queries(const Panel& panel);
  bool take_tile(TokenCursor& cursor);
  int64_t find_token(int64_t position) const;
  void attend(Panel& panel);
  template <int C>
  void attend(Panel& panel, const TileRange& range);
  LaneLogits lane_logits(const Panel& panel) const;
  void store_results(const Panel& panel);

  const AttentionParams& p_;
  const AttentionItem& item_;
  const Layout layout_;
  const int64_t group_, rows_, first_token_, q_len_, seq_len_;
  int64_t num_panels_;
  Panel* panels_;
  float *keys_, *values_, *scores_, *staging_;
  TokenTile tile_;
  const float* key_rows_[kMaxTileTokens];
  bool values_packed_ = false;
};

template <class Words>
QueryTile<Words>::QueryTile(const AttentionParams& p, const AttentionItem& item, Panel* panels,
                            float* scratch)
    : p_(p),
      item_(item),
      layout_(p, Words::kPack),
      group_(p.num_heads / p.num_kv_heads),
      rows_((item.q_end - item.q_begin) * group_),
      first_token_(p.cu_seqlens_q[item.row]),
      q_len_(p.cu_seqlens_q[item.row + 1] - first_token_),
      seq_len_(p.seq_lens[item.row]),
      num_panels_(ceil_div(rows_, kPanel)),
      panels_(panels) {
  keys_ = scratch;
  values_ = keys_ + layout_.tile_tokens * layout_.key_stride;
  scores_ = values_ + kTileSteps * layout_.value_stride;
  staging_ = scores_ + layout_.tile_tokens * kPanel;
  float* words = staging_ + kWidth * layout_.staging_stride();
  for (int64_t i = 0; i < num_panels_; ++i) {
    place_panel(panels_[i], i, words + i * layout_.panel_words());
    load_queries(panels_[i]);
  }
}

template <class Words>
void QueryTile<Words>::place_panel(Panel& panel, int64_t index, float* words) {
  panel.first_row = index * kPanel;
  panel.vecs = ceil_div(rows_of(panel), kWidth);
  panel.fresh = true;
  panel.queries = words;
  panel.out = panel.queries + layout_.steps * kPanel;
  panel.max = panel.out + layout_.out_rows * kPanel;
  panel.sum = panel.max + kPanel;
  panel.low = reinterpret_cast<int32_t*>(panel.sum + kPanel);
  panel.end = panel.low + kPanel;
  panel.seen_low = panel.shared_end = seq_len_;
  panel.seen_end = panel.shared_low = 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    panel.max[i] = kNoMax;
    panel.sum[i] = 0.0f;
    // Lanes without a row see what the last row sees.
    const int64_t row = panel.first_row + min_of(i, rows_of(panel) - 1);
    const KvRange seen = visible_keys(p_, position_of(row), seq_len_);
    panel.low[i] = static_cast<int32_t>(seen.begin);
    panel.end[i] = static_cast<int32_t>(seen.end);
    panel.shared_low = max_of(panel.shared_low, seen.begin);
    panel.shared_end = min_of(panel.shared_end, seen.end);
    if (seen.begin >= seen.end) continue;
    panel.seen_low = min_of(panel.seen_low, seen.begin);
    panel.seen_end = max_of(panel.seen_end, seen.end);
  }
}

template <class Words>
void QueryTile<Words>::load_queries(const Panel& panel) {
  const int64_t stride = layout_.staging_stride();
  for (int64_t c = 0; c < panel.vecs; ++c) {
    clear_words(staging_, kWidth * stride);
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = panel.first_row + c * kWidth + i;
      if (row >= rows_) break;
      const int64_t element = (first_token_ + query_of(row)) * p_.q_stride_token +
                              head_of(row) * p_.q_stride_head;
      convert_row(static_cast<const char*>(p_.q) + element * element_size(p_.q_dtype), p_.q_dtype,
                  {}, p_.head_dim, reinterpret_cast<Element*>(staging_ + i * stride));
    }
    for (int64_t step = 0; step < layout_.steps; step += kWidth) {
      Vec words[kWidth];
      for (int i = 0; i < kWidth; ++i) words[i] = load(staging_ + i * stride + step);
      transpose(words);
      const int64_t steps = min_of<int64_t>(kWidth, layout_.steps - step);
      for (int64_t i = 0; i < steps; ++i)
        store(panel.queries + (step + i) * kPanel + c * kWidth, words[i]);
    }
  }
}

// The next tokens of the row, with their keys packed; false at the end.
template <class Words>
bool QueryTile<Words>::take_tile(TokenCursor& cursor) {
  tile_.count =
      cursor.take(layout_.tile_tokens, tile_.positions, tile_.k_offsets, tile_.v_offsets);
  if (tile_.count == 0) return false;
  tile_.padded = round_up(tile_.count, kMaxTileRows);
  tile_.origin = tile_.positions[0];
  for (int64_t i = 0; i < tile_.padded; ++i)
    tile_.places[i] = i < tile_.count ? static_cast<float>(tile_.positions[i] - tile_.origin)
                                      : kInfinity;
  find_keys<Words>(side(p_.k, p_.k_scale, p_.head_dim), tile_, keys_, layout_.key_stride, key_rows_);
  pack_values<Words>(side(p_.v, p_.v_scale, p_.v_head_dim), tile_, values_, layout_.value_stride);
  return true;
}

// Index of the first token of the tile at or past `position`.
template <class Words>
int64_t QueryTile<Words>::find_token(int64_t position) const {
  int64_t low = 0, high = tile_.count;
  const bool has_holes = tile_.positions[high - 1] - tile_.origin != high - 1;
  if (!has_holes) return max_of<int64_t>(0, min_of(position - tile_.origin, high));
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tile_.positions[middle] < position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class Words>
void QueryTile<Words>::attend(Panel& panel) {
  TileRange range{find_token(panel.seen_low), find_token(panel.seen_end),
                  find_token(panel.shared_low), find_token(panel.shared_end)};
  if (range.begin >= range.end) return;
  range.begin = range.begin / kMaxTileRows * kMaxTileRows;
  range.end = round_up(range.end, kMaxTileRows);
  switch (panel.vecs) {
    case 1:
      return attend<1>(panel, range);
    case 2:
      return attend<2>(panel, range);
    case 3:
      return attend<min_of(3, kPanelVecs)>(panel, range);
    default:
      return attend<kPanelVecs>(panel, range);
  }
}

template <class Words>
template <int C>
void QueryTile<Words>::attend(Panel& panel, const TileRange& range) {
  Vec tops[C], shrink[C];
  score_tokens<Words>(panel, key_rows_, layout_.steps, range, tile_.places,
                      lane_limits(panel, tile_.origin), scores_, tops);
  float factor = p_.scale * kLog2e;
  if (!has_plain_logits(p_)) {
    modify_logits(p_, lane_logits(panel), tile_, range, scores_, tops);
    factor = 1.0f;
  }
  const bool raised = raise_maxima(panel, tops, factor, shrink);
  weigh_tokens<Words, C>(panel, range, factor, scores_);
  add_values<Words>(panel, values_, layout_.value_stride, p_.v_head_dim, range, scores_, raised,
                    shrink);
  panel.fresh = false;
}

template <class Words>
LaneLogits QueryTile<Words>::lane_logits(const Panel& panel) const {
  LaneLogits lanes;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t row = panel.first_row + min_of(i, rows_of(panel) - 1);
    lanes.slope[i] = p_.alibi_slopes != nullptr ? p_.alibi_slopes[head_of(row)] : 0.0f;
    lanes.place[i] = static_cast<float>(position_of(row) - tile_.origin);
    lanes.bias_row[i] = item_.row * p_.bias.stride_batch + head_of(row) * p_.bias.stride_head +
                        query_of(row) * p_.bias.stride_query;
  }
  return lanes;
}

template <class To>
void store_row(const float* from, int64_t n, void* to, int64_t element) {
  convert_row(from, {}, n, static_cast<To*>(to) + element);
}

template <class Words>
void QueryTile<Words>::store_results(const Panel& panel) {
  const int64_t stride = layout_.staging_stride();
  const bool is_partial = item_.partial_out != nullptr;
  if (panel.fresh) clear_words(panel.out, layout_.out_rows * kPanel);
  for (int64_t c = 0; c < panel.vecs; ++c) {
    float scales[kWidth];
    const int64_t first_row = panel.first_row + c * kWidth;
    const int64_t rows = min_of<int64_t>(kWidth, rows_ - first_row);
    const int64_t first_out = is_partial ? 0 : first_token_;
    const auto out_index = [&](int64_t row) {
      return (first_out + query_of(row)) * p_.num_heads + head_of(row);
    };
    float* lse = is_partial ? item_.partial_lse : p_.lse;
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = first_row + min_of(i, rows - 1);
      const bool has_sink = p_.sinks != nullptr && !is_partial;
      const Normalizer normal = normalize(panel.max[c * kWidth + i], panel.sum[c * kWidth + i],
                                          has_sink ? p_.sinks + head_of(row) : nullptr);
      scales[i] = normal.scale;
      if (i < rows) lse[out_index(row)] = normal.lse;
    }
    for (int64_t d = 0; d < p_.v_head_dim; d += kWidth) {
      Vec columns[kWidth];
      for (int i = 0; i < kWidth; ++i)
        columns[i] = load(panel.out + (d + i) * kPanel + c * kWidth) * load(scales);
      transpose(columns);
      for (int i = 0; i < kWidth; ++i) store(staging_ + i * stride + d, columns[i]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t element = out_index(first_row + i) * p_.v_head_dim;
      const float* from = staging_ + i * stride;
      if (is_partial || p_.q_dtype == DType::kFloat32)
        store_row<float>(from, p_.v_head_dim, is_partial ? item_.partial_out : p_.out, element);
      else if (p_.q_dtype == DType::kFloat16)
        store_row<Float16>(from, p_.v_head_dim, p_.out, element);
      else
        store_row<BFloat16>(from, p_.v_head_dim, p_.out, element);
    }
  }
}

template <class Words>
void QueryTile<Words>::run() {
  TokenCursor cursor(p_, item_.row, item_.kv_begin, item_.kv_end);
  while (take_tile(cursor))
    for (int64_t i = 0; i < num_panels_; ++i) attend(panels_[i]);
  for (int64_t i = 0; i < num_panels_; ++i) store_results(panels_[i]);
}

// Whether words are pairs of bf16: rounding K, V and the weights to it is as exact as the inputs.
bool uses_bf16_words([[maybe_unused]] const AttentionParams& p) {
#ifdef __AVX512BF16__
  const auto fits = [](DType dtype) {
    return dtype == DType::kBFloat16 || dtype == DType::kFloat8E4M3;
  };
  return p.q_dtype == DType::kBFloat16 && fits(p.k.dtype) && fits(p.v.dtype);
#else
  return false;
#endif
}

}  // namespace

int64_t prefill_query_tile(const AttentionParams& p) { return queries_per_item(p); }

int64_t prefill_scratch_bytes(const AttentionParams& p) {
  const Layout layout(p, uses_bf16_words(p) ? 2 : 1);
  const int64_t panels = layout.panels * static_cast<int64_t>(sizeof(Panel));
  return kAlignment + round_up(panels, kAlignment) +
         layout.words() * static_cast<int64_t>(sizeof(float));
}

void prefill(const AttentionParams& p, const AttentionItem& item, void* scratch) {
  const Layout layout(p, uses_bf16_words(p) ? 2 : 1);
  char* aligned = static_cast<char*>(scratch);
  aligned += -reinterpret_cast<uintptr_t>(aligned) % kAlignment;
  Panel* panels = reinterpret_cast<Panel*>(aligned);
  float* words = reinterpret_cast<float*>(
      aligned + round_up(layout.panels * static_cast<int64_t>(sizeof(Panel)), kAlignment));
#ifdef __AVX512BF16__
  if (uses_bf16_words(p)) return QueryTile<Bf16Words>(p, item, panels, words).run();
#endif
  QueryTile<Fp32Words>(p, item, panels, words).run();
}

}  // namespace pykvcache::KV_ISA
