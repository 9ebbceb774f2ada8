// Attention of a few queries of one KV head, with any option of the contract and at any query
// length: query tokens times the G query heads of the KV head are rows, rows are lanes of panels
// (panel.h), and the keys they see pass by in tiles under an online softmax. Read gemm.h and
// panel.h first.
#include "cpu/kernels.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/panel.h"
#include "cpu/kernels/prefill_layout.h"
#include "cpu/visible.h"

namespace pykvcache::KV_ISA {
namespace {

// The panels of one item and the tile of tokens that passes by.
template <class Words>
class QueryTile {
 public:
  QueryTile(const AttentionParams& p, const AttentionItem& item, const Layout& layout,
            const Scratch& scratch);
  void run();

 private:
  using Element = typename Words::Element;

  int64_t query_of(int64_t row) const { return item_.q_begin + row / group_; }
  int64_t head_of(int64_t row) const { return item_.head_begin * group_ + row % group_; }
  int64_t position_of(int64_t row) const { return seq_len_ - q_len_ + query_of(row); }
  int64_t rows_of(const Panel& panel) const {
    return min_of<int64_t>(kPanel, rows_ - panel.first_row);
  }
  const int32_t* blocks() const { return p_.block_table + item_.row * p_.block_table_stride; }

  void place_panel(Panel& panel, int64_t index);
  void load_queries(const Panel& panel);
  void attend(Panel& panel);
  template <int C>
  void attend(Panel& panel, const TileRange& range);
  LaneLogits lane_logits(const Panel& panel) const;
  void finish(const Panel& panel);
  // Stores lse, or a split's state; returns what the row's values are multiplied by.
  float finish_row(int64_t row, float max, float sum) const;
  void store_out(int64_t row, const float* out) const;

  const AttentionParams& p_;
  const AttentionItem& item_;
  const Layout& layout_;
  const Scratch& scratch_;
  const int64_t group_, rows_, first_token_, q_len_, seq_len_;
  const int64_t num_panels_;
  const Side key_side_, value_side_;
  const float scale_;  // of q . k
  const TokenTile* tile_ = nullptr;
  const float* keys_[kMaxTileTokens];
  Lookahead ahead_;
};

template <class Words>
QueryTile<Words>::QueryTile(const AttentionParams& p, const AttentionItem& item,
                            const Layout& layout, const Scratch& scratch)
    : p_(p),
      item_(item),
      layout_(layout),
      scratch_(scratch),
      group_(p.num_heads / p.num_kv_heads),
      rows_((item.q_end - item.q_begin) * group_),
      first_token_(p.cu_seqlens_q[item.row]),
      q_len_(p.cu_seqlens_q[item.row + 1] - first_token_),
      seq_len_(p.seq_lens[item.row]),
      num_panels_(ceil_div(rows_, kPanel)),
      key_side_{p.k, p.k_scale, blocks(), p.block_size, item.head_begin, p.head_dim},
      value_side_{p.v, p.v_scale, blocks(), p.block_size, item.head_begin, p.v_head_dim},
      scale_(p.scale * head_scale(key_side_)),
      ahead_(key_side_, value_side_, ceil_div(kTileRows<kPanelVecs>, num_panels_)) {}

template <class Words>
void QueryTile<Words>::run() {
  for (int64_t i = 0; i < num_panels_; ++i) {
    place_panel(scratch_.panels[i], i);
    load_queries(scratch_.panels[i]);
  }
  TokenCursor cursor(p_, item_.row, item_.kv_begin, item_.kv_end);
  TokenTile tiles[2];
  tiles[0].take(cursor, layout_.tile_tokens);
  for (int current = 0; tiles[current].count > 0; current = 1 - current) {
    TokenTile& next = tiles[1 - current];
    next.take(cursor, layout_.tile_tokens);
    ahead_.restart(next);
    tile_ = &tiles[current];
    find_keys<Words>(key_side_, *tile_, scratch_.keys, layout_.key_stride, keys_);
    pack_values<Words>(value_side_, *tile_, scratch_.values, layout_.value_stride);
    for (int64_t i = 0; i < num_panels_; ++i) attend(scratch_.panels[i]);
  }
  for (int64_t i = 0; i < num_panels_; ++i) finish(scratch_.panels[i]);
}

template <class Words>
void QueryTile<Words>::place_panel(Panel& panel, int64_t index) {
  panel.first_row = index * kPanel;
  panel.vecs = ceil_div(rows_of(panel), kWidth);
  panel.fresh = true;
  panel.queries = scratch_.panel_words + index * layout_.panel_words();
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
    clear_words(scratch_.staging, kWidth * stride);
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = panel.first_row + c * kWidth + i;
      if (row >= rows_) break;
      const int64_t element =
          (first_token_ + query_of(row)) * p_.q_stride_token + head_of(row) * p_.q_stride_head;
      convert_row(static_cast<const char*>(p_.q) + element * element_size(p_.q_dtype), p_.q_dtype,
                  {}, p_.head_dim, reinterpret_cast<Element*>(scratch_.staging + i * stride));
    }
    for (int64_t step = 0; step < layout_.steps; step += kWidth) {
      Vec words[kWidth];
      for (int i = 0; i < kWidth; ++i) words[i] = load(scratch_.staging + i * stride + step);
      transpose(words);
      const int64_t steps = min_of<int64_t>(kWidth, layout_.steps - step);
      for (int64_t i = 0; i < steps; ++i)
        store(panel.queries + (step + i) * kPanel + c * kWidth, words[i]);
    }
  }
}

template <class Words>
void QueryTile<Words>::attend(Panel& panel) {
  TileRange range{tile_->find(panel.seen_low), tile_->find(panel.seen_end),
                  tile_->find(panel.shared_low), tile_->find(panel.shared_end)};
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
  score_tokens<Words>(panel, *tile_, range, keys_, layout_.steps, ahead_, scratch_.scores, tops);
  float factor = scale_ * kLog2e;
  if (!has_plain_logits(p_, scale_)) {
    modify_logits(p_, scale_, lane_logits(panel), *tile_, range, scratch_.scores, tops);
    factor = 1.0f;
  }
  raise_maxima(panel, tops, factor, shrink);
  weigh_tokens<Words, C>(panel, range, factor, scratch_.scores);
  add_values<Words>(panel, scratch_.values, layout_.value_stride, p_.v_head_dim, range,
                    scratch_.scores, shrink);
  panel.fresh = false;
}

template <class Words>
LaneLogits QueryTile<Words>::lane_logits(const Panel& panel) const {
  LaneLogits lanes;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t row = panel.first_row + min_of(i, rows_of(panel) - 1);
    lanes.slope[i] = p_.alibi_slopes != nullptr ? p_.alibi_slopes[head_of(row)] : 0.0f;
    lanes.place[i] = static_cast<float>(position_of(row) - tile_->origin);
    lanes.bias_row[i] = item_.row * p_.bias.stride_batch + head_of(row) * p_.bias.stride_head +
                        query_of(row) * p_.bias.stride_query;
  }
  return lanes;
}

// Writes a panel's sums back as rows, normalised if they are of all keys.
template <class Words>
void QueryTile<Words>::finish(const Panel& panel) {
  const int64_t stride = layout_.staging_stride();
  if (panel.fresh) clear_words(panel.out, layout_.out_rows * kPanel);
  for (int64_t c = 0; c < panel.vecs; ++c) {
    const int64_t first_row = panel.first_row + c * kWidth;
    const int64_t rows = min_of<int64_t>(kWidth, rows_ - first_row);
    float scales[kWidth] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first_row + i, lane = c * kWidth + i;
      scales[i] = finish_row(row, panel.max[lane], panel.sum[lane]) * head_scale(value_side_);
    }
    for (int64_t d = 0; d < p_.v_head_dim; d += kWidth) {
      Vec columns[kWidth];
      for (int i = 0; i < kWidth; ++i)
        columns[i] = load(panel.out + (d + i) * kPanel + c * kWidth) * load(scales);
      transpose(columns);
      for (int i = 0; i < kWidth; ++i) store(scratch_.staging + i * stride + d, columns[i]);
    }
    for (int64_t i = 0; i < rows; ++i) store_out(first_row + i, scratch_.staging + i * stride);
  }
}

template <class Words>
float QueryTile<Words>::finish_row(int64_t row, float max, float sum) const {
  const int64_t head = head_of(row), place = query_of(row) * p_.num_heads + head;
  if (item_.partial_states != nullptr) {
    item_.partial_states[place] = {max, sum};
    return 1.0f;
  }
  const Normalizer n = normalize(max, sum, p_.sinks == nullptr ? nullptr : p_.sinks + head);
  p_.lse[first_token_ * p_.num_heads + place] = n.lse;
  return n.scale;
}

template <class Words>
void QueryTile<Words>::store_out(int64_t row, const float* out) const {
  const int64_t width = p_.v_head_dim;
  const int64_t partial = (query_of(row) * p_.num_heads + head_of(row)) * width;
  const int64_t whole = partial + first_token_ * p_.num_heads * width;
  if (item_.partial_out != nullptr)
    convert_row(out, {}, width, item_.partial_out + partial);
  else if (p_.q_dtype == DType::kFloat32)
    convert_row(out, {}, width, static_cast<float*>(p_.out) + whole);
  else if (p_.q_dtype == DType::kFloat16)
    convert_row(out, {}, width, static_cast<Float16*>(p_.out) + whole);
  else
    convert_row(out, {}, width, static_cast<BFloat16*>(p_.out) + whole);
}

}  // namespace

int64_t prefill_query_tile(const AttentionParams& p) { return queries_per_item(p); }

int64_t prefill_scratch_bytes(const AttentionParams& p) { return Layout(p).bytes(); }

void prefill(const AttentionParams& p, const AttentionItem& item, void* scratch) {
  const Layout layout(p);
  const Scratch parts(layout, scratch);
#ifdef __AVX512BF16__
  if (uses_bf16_words(p)) return QueryTile<Bf16Words>(p, item, layout, parts).run();
#endif
  QueryTile<Fp32Words>(p, item, layout, parts).run();
}

}  // namespace pykvcache::KV_ISA
