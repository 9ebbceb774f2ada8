// What both decode kernels keep of an item while its keys go by, whatever order these are read in:
// queries, the softmax state and the accumulators of every row, and the online softmax itself.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/line.h"
#include "cpu/kernels/paged.h"
#include "cpu/kernels/softmax.h"
#include "cpu/numeric.h"
#include "cpu/visible.h"

namespace pykvcache::KV_ISA {

constexpr int64_t kTokenGroup = 16;            // tiles are padded to this
constexpr int64_t kMaxTokens = 128;            // of a tile
constexpr int64_t kPageEntryBytes = 32 << 10;  // that one line of page table entries maps

// The rows of a tile in one of the caches, for head 0.
struct TileSide {
  int64_t offsets[kMaxTokens];   // in elements
  int32_t run_ends[kMaxTokens];  // end of the tokens whose rows lie together with this one's
  int64_t scales[kMaxTokens];    // offsets of their scales, if slots have any

  void find_runs(int64_t count, int64_t dim) {
    for (int64_t t = count - 1, end = count; t >= 0; --t) {
      run_ends[t] = static_cast<int32_t>(end);
      if (t > 0 && offsets[t] - offsets[t - 1] != dim) end = t;
    }
  }
};

// Tokens that are worked on together.
struct Tile {
  int64_t count = 0;
  int32_t positions[kMaxTokens];
  TileSide k, v;
};

// With scattered blocks the page walks miss the caches: a tile ahead, one load for every line of
// page table entries that K or V of all heads needs.
template <class T>
KV_INLINE void fetch_page_entries(const TileSide& side, int64_t count, const CacheView& cache,
                                  const AttentionItem& item) {
  constexpr int64_t kReach = kPageEntryBytes / static_cast<int64_t>(sizeof(T));
  const int64_t heads = max_of<int64_t>(1, kReach / max_of<int64_t>(1, cache.stride_head));
  for (int64_t t = 0, last = -1; t < count; ++t) {
    if (last >= 0 && side.offsets[t] - side.offsets[last] < kReach &&
        side.offsets[t] >= side.offsets[last])
      continue;
    for (int64_t head = item.head_begin; head < item.head_end; head += heads)
      __builtin_prefetch(head_base<T>(cache, head) + side.offsets[t]);
    last = t;
  }
}

template <class T>
KV_INLINE void fetch_page_entries(const Tile& tile, const AttentionItem& item,
                                  const AttentionParams& p) {
  fetch_page_entries<T>(tile.k, tile.count, p.k, item);
  fetch_page_entries<T>(tile.v, tile.count, p.v, item);
}

// Where the scales of a tile's slots are; those of all heads are prefetched.
KV_INLINE void locate_scales(const Tile& tile, TileSide& side, const ScaleView& scale,
                             const AttentionParams& p, const AttentionItem& item) {
  if (scale.kind != ScaleKind::kSlot) return;
  constexpr int64_t kLine = 16;  // scales
  const int32_t* blocks = p.block_table + item.row * p.block_table_stride;
  int64_t block = 0, begin = 0, end = 0;  // positions of the block
  for (int64_t t = 0; t < tile.count; ++t) {
    const int64_t position = tile.positions[t];
    const bool jumps = position < begin || position >= end;
    if (jumps) {
      block = blocks[position / p.block_size];
      begin = position / p.block_size * p.block_size;
      end = begin + p.block_size;
    }
    side.scales[t] = block * scale.stride_block + position - begin;
    if (jumps || t % kLine == 0)
      for (int64_t head = item.head_begin; head < item.head_end; ++head)
        __builtin_prefetch(scale.data + side.scales[t] + head * scale.stride_head);
  }
}

// q and the output are of the caches' type, or with float8 caches of any: calls f with a value of
// that type.
template <class T, class F>
KV_INLINE void with_query_type(DType dtype, F f) {
  if constexpr (sizeof(typename Line<T>::Query) == 2)
    f(BFloat16{});
  else if constexpr (!Line<T>::kScaled)
    f(T{});
  else if (dtype == DType::kBFloat16)
    f(BFloat16{});
  else if (dtype == DType::kFloat16)
    f(Float16{});
  else
    f(float{});
}

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
  float* scores;       // [rows, kMaxTokens]
  Prob* probs;         // [heads, rows, kMaxTokens]
  int64_t bytes = 0;

  Workspace(const AttentionParams& p, int64_t heads, int64_t query_rows, void* scratch) {
    rows = query_rows <= 2 ? query_rows : round_up(query_rows, 4);
    q_stride = round_up(p.head_dim, Line<T>::kElems);
    out_stride = round_up(p.v_head_dim, Line<T>::kElems);
    auto* base = static_cast<char*>(scratch);
    queries = carve<Query>(base, heads * rows * q_stride);
    out = carve<float>(base, heads * rows * out_stride);
    sums = carve<float>(base, heads * rows * kWidth);
    maxima = carve<float>(base, heads * rows);
    scores = carve<float>(base, rows * kMaxTokens);
    probs = carve<Prob>(base, heads * rows * kMaxTokens);
  }

 private:
  template <class U>
  U* carve(char* base, int64_t count) {
    U* at = reinterpret_cast<U*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return at;
  }
};

template <class T>
class DecodeState {
 public:
  DecodeState(const AttentionParams& p, const AttentionItem& item, void* scratch)
      : p_(p),
        item_(item),
        group_(p.num_heads / p.num_kv_heads),
        first_token_(p.cu_seqlens_q[item.row] + item.q_begin),
        query_rows_((item.q_end - item.q_begin) * group_),
        seq_len_(p.seq_lens[item.row]),
        first_position_(seq_len_ - (p.cu_seqlens_q[item.row + 1] - p.cu_seqlens_q[item.row]) +
                        item.q_begin),
        plain_(p.softcap == 0.0f && p.alibi_slopes == nullptr && p.scale > 0.0f),
        w_(p, item.head_end - item.head_begin, query_rows_, scratch),
        all_see_(visible_to_all()) {}

 protected:
  void begin() {
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) begin_head(head);
  }

  // Outputs and lse of all heads.
  void finish() const {
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) finish_head(head);
  }

  using L = Line<T>;
  using Query = typename L::Query;
  using Prob = typename L::Prob;

  int64_t local(int64_t head) const { return head - item_.head_begin; }
  const Query* queries(int64_t head) const {
    return w_.queries + local(head) * w_.rows * w_.q_stride;
  }
  float* out_row(int64_t head, int64_t row) const {
    return w_.out + (local(head) * w_.rows + row) * w_.out_stride;
  }
  Prob* prob_row(int64_t head, int64_t row) const {
    return w_.probs + (local(head) * w_.rows + row) * kMaxTokens;
  }
  float* score_row(int64_t row) const { return w_.scores + row * kMaxTokens; }

  // Scores of one row to base-2 logits, in place, when more than a scale is asked for.
  void transform(const Tile& tile, int64_t head, int64_t row, float* scores, int64_t padded) const {
    const int64_t position = first_position_ + row / group_;
    if (p_.softcap != 0.0f)
      for (int64_t t = 0; t < padded; t += kWidth)
        store(scores + t, tanh(load(scores + t) * broadcast(p_.scale / p_.softcap)) *
                              broadcast(p_.softcap * kLog2e));
    else
      for (int64_t t = 0; t < padded; t += kWidth)
        store(scores + t, load(scores + t) * broadcast(p_.scale * kLog2e));
    if (p_.alibi_slopes != nullptr) {
      const float slope = p_.alibi_slopes[head * group_ + row % group_] * kLog2e;
      for (int64_t t = 0; t < tile.count; ++t)
        scores[t] += slope * static_cast<float>(tile.positions[t] - position);
    }
  }

  // Before the softmax of a head's rows: the scales of its keys and values.
  void take_scales(const Tile& tile, int64_t head) {
    if constexpr (L::kScaled) {
      take_scales(tile, tile.k, p_.k_scale, head, k_scales_);
      take_scales(tile, tile.v, p_.v_scale, head, v_scales_);
    }
  }

  // The weights of a tile's tokens from their scores, which are lost; padded: the tile's count, up
  // to whole kTokenGroup.
  void softmax(const Tile& tile, int64_t head, int64_t row, int64_t padded, float* scores) {
    Vec factor = broadcast(p_.scale * kLog2e);
    if constexpr (L::kScaled)
      for (int64_t t = 0; t < padded; t += kWidth)
        store(scores + t, load(scores + t) * load(k_scales_ + t));
    if (!plain_) {
      transform(tile, head, row, scores, padded);
      factor = broadcast(1.0f);
    }
    if (tile.positions[0] < all_see_.begin || tile.positions[tile.count - 1] >= all_see_.end) {
      const KvRange keys = visible_keys(p_, first_position_ + row / group_, seq_len_);
      for (int64_t t = 0; t < tile.count; ++t)
        if (tile.positions[t] < keys.begin || tile.positions[t] >= keys.end) scores[t] = -kInfinity;
    }
    for (int64_t t = tile.count; t < padded; ++t) scores[t] = -kInfinity;

    const int64_t state = local(head) * w_.rows + row;
    float* sums = w_.sums + state * kWidth;
    Vec highest = broadcast(-kInfinity);
    for (int64_t t = 0; t < padded; t += kWidth) highest = max(highest, load(scores + t) * factor);
    if (any_greater(highest, broadcast(w_.maxima[state] + kMaxLag)))
      raise_max(head, row, reduce_max(highest));
    const Vec shift = broadcast(w_.maxima[state]);
    Vec sum = load(sums);
    Prob* probs = prob_row(head, row);
    for (int64_t t = 0; t < padded; t += kWidth) {
      const Vec weight = exp2(load(scores + t) * factor - shift);
      sum = sum + weight;
      if constexpr (L::kScaled)
        store(probs + t, weight * load(v_scales_ + t));
      else
        store(probs + t, weight);
    }
    store(sums, sum);
  }

  void raise_max(int64_t head, int64_t row, float highest) {
    const int64_t state = local(head) * w_.rows + row;
    float* sums = w_.sums + state * kWidth;
    const Vec shrink = exp2(broadcast(w_.maxima[state] - highest));
    w_.maxima[state] = highest;
    store(sums, load(sums) * shrink);
    float* out = out_row(head, row);
    for (int64_t d = 0; d < w_.out_stride; d += kWidth) store(out + d, load(out + d) * shrink);
  }

  const AttentionParams& p_;
  const AttentionItem& item_;
  const int64_t group_;
  const int64_t first_token_;  // of the item, in the packed queries
  const int64_t query_rows_;
  const int64_t seq_len_;
  const int64_t first_position_;  // of the item's first query; negative in left padding
  const bool plain_;              // scores need no more than the scale
  Workspace<T> w_;

 private:
  // Keys that no query of the item is kept from.
  KvRange visible_to_all() const {
    const int64_t last_position = first_position_ + (item_.q_end - item_.q_begin) - 1;
    return {visible_keys(p_, last_position, seq_len_).begin,
            visible_keys(p_, first_position_, seq_len_).end};
  }

  void begin_head(int64_t head) {
    const int64_t first = local(head) * w_.rows;
    Query* queries = w_.queries + first * w_.q_stride;
    __builtin_memset(queries, 0, static_cast<size_t>(w_.rows * w_.q_stride) * sizeof(Query));
    __builtin_memset(w_.out + first * w_.out_stride, 0,
                     static_cast<size_t>(w_.rows * w_.out_stride) * sizeof(float));
    __builtin_memset(w_.sums + first * kWidth, 0,
                     static_cast<size_t>(w_.rows * kWidth) * sizeof(float));
    for (int64_t row = 0; row < w_.rows; ++row) w_.maxima[first + row] = kNoMax;
    for (int64_t row = 0; row < query_rows_; ++row) {
      const int64_t at = (first_token_ + row / group_) * p_.q_stride_token +
                         (head * group_ + row % group_) * p_.q_stride_head;
      with_query_type<T>(p_.q_dtype, [&]<class Q>(Q) {
        L::pack_query(queries + row * w_.q_stride, static_cast<const Q*>(p_.q) + at, p_.head_dim);
      });
    }
  }

  void finish_head(int64_t head) const {
    const bool partial = item_.partial_out != nullptr;
    const int64_t first = partial ? item_.q_begin : first_token_;  // of the item, in the output
    for (int64_t row = 0; row < query_rows_; ++row) {
      const int64_t q_head = head * group_ + row % group_;
      const int64_t place = (first + row / group_) * p_.num_heads + q_head;
      const int64_t state = local(head) * w_.rows + row;
      float* from = out_row(head, row);
      for (int64_t d = 0; d < w_.out_stride; d += L::kElems) L::restore_order(from + d);
      const float max = w_.maxima[state], sum = reduce_add(load(w_.sums + state * kWidth));
      const int64_t at = place * p_.v_head_dim;
      if (partial) {
        item_.partial_states[place] = {max, sum};
        store_scaled(item_.partial_out + at, from, 1.0f, p_.v_head_dim);
        continue;
      }
      const Normalizer n = normalize(max, sum, p_.sinks == nullptr ? nullptr : p_.sinks + q_head);
      p_.lse[place] = n.lse;
      with_query_type<T>(p_.q_dtype, [&]<class Q>(Q) {
        store_scaled(static_cast<Q*>(p_.out) + at, from, n.scale, p_.v_head_dim);
      });
    }
  }

  static void take_scales(const Tile& tile, const TileSide& side, const ScaleView& scale,
                          int64_t head, float* to) {
    const int64_t padded = round_up(tile.count, kTokenGroup);
    if (scale.kind == ScaleKind::kSlot) {
      const float* from = scale.data + head * scale.stride_head;
      for (int64_t t = 0; t < tile.count; ++t) to[t] = from[side.scales[t]] * L::kUnit;
      for (int64_t t = tile.count; t < padded; ++t) to[t] = 0.0f;
      return;
    }
    float all = L::kUnit;
    if (scale.kind == ScaleKind::kScalar) all *= *scale.data;
    if (scale.kind == ScaleKind::kHead) all *= scale.data[head * scale.stride_head];
    for (int64_t t = 0; t < padded; t += kWidth) store(to + t, broadcast(all));
  }

  float k_scales_[L::kScaled ? kMaxTokens : 1], v_scales_[L::kScaled ? kMaxTokens : 1];

  const KvRange all_see_;
};

}  // namespace pykvcache::KV_ISA
