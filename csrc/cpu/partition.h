// How one attention call is cut into items for the threads. Every batch row is one segment for the
// decode kernel, or one segment per (KV head, query tile) for the general one. Segments are laid
// end to end and cut by cost, first into large pieces and towards the end into small ones; threads
// take pieces from a shared counter, so a thread whose core is stolen takes fewer. A segment that
// is cut along its keys is merged from its splits. With params.deterministic cuts are at fixed
// positions and depend on nothing but the segment. No torch header here. Read next: attention.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/visible.h"

namespace pykvcache {

struct WorkItem {
  AttentionItem part;
  bool decode;
  int64_t merge;  // index of the Merge this is a split of, or -1
  int64_t split;
};

// A segment computed in splits. Offsets are in floats from the start of the call's partials; the
// segments of a batch row share its [splits, q_len, HQ, Dv] and its states [splits, q_len, HQ].
struct Merge {
  AttentionItem whole;
  int64_t num_splits;
  int64_t out_offset = 0;
  int64_t states_offset = 0;
};

class Partition {
 public:
  // Reuses the vectors of the previous call. query_tile: of the general kernel.
  void cut(const AttentionParams& p, int64_t max_threads, int64_t query_tile) {
    segments_.clear();
    items_.clear();
    merges_.clear();
    total_cost_ = 0;
    for (int64_t row = 0; row < p.batch; ++row) add_row(p, row, query_tile);
    num_threads_ = total_cost_ < kMinParallelCost ? 1 : max_threads;
    double left = total_cost_;
    for (const Segment& segment : segments_) {
      find_bounds(p, segment, left);
      add_items(segment);
      left -= segment.cost(segment.whole.kv_begin, segment.whole.kv_end);
    }
    num_threads_ = std::min(num_threads_, static_cast<int64_t>(items_.size()));
    place_partials(p);
  }

  const std::vector<WorkItem>& items() const { return items_; }
  const std::vector<Merge>& merges() const { return merges_; }
  int64_t num_threads() const { return num_threads_; }
  int64_t partial_floats() const { return partial_floats_; }
  bool has_general_items() const {
    return std::any_of(segments_.begin(), segments_.end(), [](auto& s) { return !s.decode; });
  }

 private:
  // Costs are in bytes that one thread streams from memory, about 20 GB/s.
  static constexpr double kMinParallelCost = 512 << 10;
  static constexpr double kMinItemCost = 256 << 10;
  static constexpr double kFlopsPerByte = 15;
  static constexpr int64_t kItemsPerThread = 2;
  static constexpr int64_t kCutTokens = 64;  // cuts are at multiples of this
  // Tokens, when deterministic. A query tile has enough work by itself, and merging costs.
  static constexpr int64_t kFixedSplit = 512;
  static constexpr int64_t kFixedGeneralSplit = 8192;

  static constexpr int64_t kFloatsPerState = sizeof(PartialState) / sizeof(float);

  struct Segment {
    AttentionItem whole;
    bool decode;
    double cost_per_key;
    double cost(int64_t begin, int64_t end) const {
      return cost_per_key * static_cast<double>(end - begin);
    }
  };

  static bool is_decode(const AttentionParams& p, int64_t rows_per_head) {
    if (rows_per_head > kMaxDecodeRows || p.bias.data != nullptr) return false;
    if (p.k.dtype == DType::kFloat8E4M3)
      return p.k_scale.kind != ScaleKind::kChannel && p.v_scale.kind != ScaleKind::kChannel;
    return p.q_dtype == p.k.dtype && p.k_scale.kind == ScaleKind::kNone &&
           p.v_scale.kind == ScaleKind::kNone;
  }

  void add_row(const AttentionParams& p, int64_t row, int64_t query_tile) {
    const int64_t q_len = p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row];
    const int64_t group = p.num_heads / p.num_kv_heads;
    if (q_len == 0) return;
    AttentionItem whole;
    whole.row = row;
    if (is_decode(p, q_len * group)) {
      whole.head_end = p.num_kv_heads;
      whole.q_end = q_len;
      const int64_t dims = p.num_kv_heads * (p.head_dim + p.v_head_dim);
      add_segment(p, whole, true, static_cast<double>(dims * element_size(p.k.dtype)));
      return;
    }
    for (whole.head_begin = 0; whole.head_begin < p.num_kv_heads; ++whole.head_begin) {
      whole.head_end = whole.head_begin + 1;
      // Last tiles first: under a causal mask they see the most keys.
      for (int64_t tile = (q_len - 1) / query_tile; tile >= 0; --tile) {
        whole.q_begin = tile * query_tile;
        whole.q_end = std::min(whole.q_begin + query_tile, q_len);
        const int64_t rows = (whole.q_end - whole.q_begin) * group;
        const int64_t flops = 2 * rows * (p.head_dim + p.v_head_dim);
        add_segment(p, whole, false, static_cast<double>(flops) / kFlopsPerByte);
      }
    }
  }

  void add_segment(const AttentionParams& p, AttentionItem whole, bool decode,
                   double cost_per_key) {
    const int64_t seq_len = p.seq_lens[whole.row];
    const int64_t q_len = p.cu_seqlens_q[whole.row + 1] - p.cu_seqlens_q[whole.row];
    const int64_t first = seq_len - q_len;
    const KvRange keys = visible_keys(p, first + whole.q_begin, first + whole.q_end - 1, seq_len);
    whole.kv_begin = keys.begin;
    whole.kv_end = std::max(keys.begin, keys.end);
    segments_.push_back({whole, decode, cost_per_key});
    total_cost_ += segments_.back().cost(whole.kv_begin, whole.kv_end);
  }

  // left: cost of this segment and all later ones.
  void find_bounds(const AttentionParams& p, const Segment& segment, double left) {
    int64_t begin = segment.whole.kv_begin;
    const int64_t end = segment.whole.kv_end;
    bounds_.clear();
    if (p.deterministic) {
      const int64_t step = segment.decode ? kFixedSplit : kFixedGeneralSplit;
      for (int64_t at = (begin / step + 1) * step; at < end; at += step) bounds_.push_back(at);
    } else if (num_threads_ > 1) {
      while (begin < end) {
        const double target = target_cost(p, segment, left);
        if (segment.cost(begin, end) < 1.5 * target) break;
        const auto tokens = static_cast<int64_t>(target / segment.cost_per_key);
        const int64_t bound = (begin + tokens) / kCutTokens * kCutTokens + kCutTokens;
        if (bound >= end) break;
        bounds_.push_back(bound);
        left -= segment.cost(begin, bound);
        begin = bound;
      }
    }
    bounds_.push_back(end);
  }

  // The general kernel's segments are long enough by themselves unless there are few.
  double target_cost(const AttentionParams& p, const Segment& segment, double left) const {
    const int64_t pieces =
        segment.decode && p.launch.splits > 0 ? p.launch.splits : kItemsPerThread;
    const double share =
        (segment.decode ? left : total_cost_) / static_cast<double>(pieces * num_threads_);
    return std::max(kMinItemCost, share);
  }

  void add_items(const Segment& segment) {
    const auto splits = static_cast<int64_t>(bounds_.size());
    const int64_t merge = splits > 1 ? static_cast<int64_t>(merges_.size()) : -1;
    AttentionItem part = segment.whole;
    for (int64_t split = 0; split < splits; ++split) {
      part.kv_end = bounds_[split];
      items_.push_back({part, segment.decode, merge, split});
      part.kv_begin = part.kv_end;
    }
    if (splits > 1) merges_.push_back({segment.whole, splits});
  }

  void place_partials(const AttentionParams& p) {
    partial_floats_ = 0;
    for (size_t first = 0, last = 0; first < merges_.size(); first = last) {
      const int64_t row = merges_[first].whole.row;
      const int64_t q_len = p.cu_seqlens_q[row + 1] - p.cu_seqlens_q[row];
      int64_t splits = 0;
      for (; last < merges_.size() && merges_[last].whole.row == row; ++last)
        splits = std::max(splits, merges_[last].num_splits);
      const int64_t states = splits * q_len * p.num_heads;
      for (size_t i = first; i < last; ++i) {
        merges_[i].out_offset = partial_floats_;
        merges_[i].states_offset = partial_floats_ + states * p.v_head_dim;
      }
      partial_floats_ += states * (p.v_head_dim + kFloatsPerState);
    }
  }

  std::vector<Segment> segments_;
  std::vector<int64_t> bounds_;
  std::vector<WorkItem> items_;
  std::vector<Merge> merges_;
  double total_cost_ = 0;
  int64_t num_threads_ = 1;
  int64_t partial_floats_ = 0;
};

}  // namespace pykvcache
