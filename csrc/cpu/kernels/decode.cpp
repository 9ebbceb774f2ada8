// Attention of a few query rows over a paged cache: decode and speculative decode. Tile by tile of
// tokens, K of every head and then V of every head, which is the order in which a block lies in
// memory; decode_tile.h has the order and the prefetching. For each head of a tile:
//   scores  [rows, tile]  q . k, transposed sums of kAccumulators dot products at a time
//   softmax [rows, tile]  online; sums are rescaled only when the maximum has grown a lot
//   values  [rows, Dv]    p . v, added to the head's accumulators
// rows are the q_len * G query rows of a KV head, query-major. Needs AttentionItem as kernels.h
// says.
#include "cpu/kernels.h"
#include "cpu/kernels/decode_tile.h"
#include "cpu/kernels/line.h"
#include "cpu/kernels/paged.h"
#include "cpu/kernels/softmax.h"
#include "cpu/numeric.h"
#include "cpu/visible.h"

namespace pykvcache::KV_ISA {
namespace {

template <class T>
class Decode {
 public:
  Decode(const AttentionParams& p, const AttentionItem& item, void* scratch)
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
        steps_(p, item),
        all_see_(visible_to_all()) {}

  void run() {
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) begin_head(head);
    while (steps_.current().tile->count > 0) {
      for (int64_t head = item_.head_begin; head < item_.head_end; ++head, steps_.advance())
        weigh(steps_.current(), head);
      for (int64_t head = item_.head_begin; head < item_.head_end; ++head, steps_.advance())
        add_values(steps_.current(), head);
    }
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) finish_head(head);
  }

 private:
  using L = Line<T>;
  using Query = typename L::Query;
  using Prob = typename L::Prob;

  // Calls f<R, is first>(row) for groups of 4, 2 or 1 rows; a group of 4 may end in one padding
  // row.
  template <class F>
  KV_INLINE void for_row_groups(int64_t rows, F f) {
    for (int64_t row = 0; row < rows; row += 4) {
      if (row == 0)
        row_group<true>(rows, row, f);
      else
        row_group<false>(rows, row, f);
    }
  }

  template <bool kFirst, class F>
  KV_INLINE void row_group(int64_t rows, int64_t row, F f) {
    if (rows - row >= 3)
      f.template operator()<4, kFirst>(row);
    else if (rows - row == 2)
      f.template operator()<2, kFirst>(row);
    else
      f.template operator()<1, kFirst>(row);
  }

  // Keys that no query of the item is kept from.
  KvRange visible_to_all() const {
    const int64_t last_position = first_position_ + (item_.q_end - item_.q_begin) - 1;
    return {visible_keys(p_, last_position, seq_len_).begin,
            visible_keys(p_, first_position_, seq_len_).end};
  }

  int64_t local(int64_t head) const { return head - item_.head_begin; }
  float* out_row(int64_t head, int64_t row) const {
    return w_.out + (local(head) * w_.rows + row) * w_.out_stride;
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
      const T* q = static_cast<const T*>(p_.q) + (first_token_ + row / group_) * p_.q_stride_token +
                   (head * group_ + row % group_) * p_.q_stride_head;
      L::pack_query(queries + row * w_.q_stride, q, p_.head_dim);
    }
  }

  Prob* prob_row(int64_t head, int64_t row) const {
    return w_.probs + (local(head) * w_.rows + row) * kMaxTile;
  }

  // Scores of a head's keys and their weights in the softmax.
  void weigh(const Step<T>& keys, int64_t head) {
    const int64_t padded = round_up(keys.tile->count, kTokenGroup);
    const Query* queries = w_.queries + local(head) * w_.rows * w_.q_stride;
    for_row_groups(query_rows_, [&]<int R, bool kFirst>(int64_t row) {
      score<R, kFirst>(queries + row * w_.q_stride, keys.rows, padded, w_.scores + row * kMaxTile);
    });
    for (int64_t row = 0; row < query_rows_; ++row) softmax(*keys.tile, head, row, padded);
  }

  // The weighted sum of a head's values.
  void add_values(const Step<T>& values, int64_t head) {
    for_row_groups(query_rows_, [&]<int R, bool kFirst>(int64_t row) {
      add_values<R, kFirst>(prob_row(head, row), values.rows, values.tile->count,
                            out_row(head, row));
    });
  }

  // kFirst: the first pass over these keys; it prefetches.
  template <int R, bool kFirst>
  void score(const Query* queries, const T* const* rows, int64_t count, float* scores) {
    constexpr int N = kAccumulators / R;           // tokens at a time
    constexpr int kVecs = kAccumulators / kWidth;  // that their scores fill
    const int64_t whole = p_.head_dim / L::kElems * L::kElems;
    const auto tail = static_cast<int>(p_.head_dim - whole);
    LinesAhead ahead = steps_.lines_ahead();
    const auto tick = [&]() __attribute__((always_inline)) {
      if constexpr (kFirst) ahead.prefetch<min_of(N, kTick)>();
    };
    for (int64_t t = 0; t < count; t += kAccumulators) {
      Vec parts[R * kVecs];
      for (int part = 0; part < R; ++part) {
        Vec sums[kAccumulators];
        for (Vec& sum : sums) sum = zero();
        const T* const* keys = rows + t + part * N;
        for (int64_t d = 0; d < whole; d += L::kElems)
          L::template dot<R, N, false>(sums, queries, w_.q_stride, keys, d, L::kElems, tick);
        if (tail > 0)
          L::template dot<R, N, true>(sums, queries, w_.q_stride, keys, whole, tail, tick);
        for (int i = 0; i < kVecs; ++i) {
          Vec chosen[kWidth];
          for (int lane = 0; lane < kWidth; ++lane) chosen[lane] = sums[i * kWidth + lane];
          parts[part * kVecs + i] = reduce_rows(chosen);
        }
      }
      store_rows<R>(scores + t, parts);
    }
  }

  // parts: for N tokens after N tokens, the scores of all R rows.
  template <int R, int kParts>
  KV_INLINE void store_rows(float* scores, Vec (&parts)[kParts]) {
    constexpr int N = kAccumulators / R;
    if constexpr (kParts == R && kWidth == 16) {
      split_rows(parts);
      for (int r = 0; r < R; ++r) store(scores + r * kMaxTile, parts[r]);
    } else {
      float lanes[kParts * kWidth];
      for (int i = 0; i < kParts; ++i) store(lanes + i * kWidth, parts[i]);
      for (int part = 0; part < R; ++part)
        for (int r = 0; r < R; ++r)
          __builtin_memcpy(scores + r * kMaxTile + part * N, lanes + (part * R + r) * N,
                           N * sizeof(float));
    }
  }

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

  void softmax(const Tile& tile, int64_t head, int64_t row, int64_t padded) {
    float* scores = w_.scores + row * kMaxTile;
    Vec factor = broadcast(p_.scale * kLog2e);
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

  // As many rows at once as fit the registers with the accumulators of a line each.
  template <int R, bool kFirst>
  void add_values(const Prob* probs, const T* const* rows, int64_t count, float* out) {
    if constexpr (R > 1 && R * L::kVecs > kAccumulators) {
      add_values<R / 2, kFirst>(probs, rows, count, out);
      add_values<R / 2, false>(probs + R / 2 * kMaxTile, rows, count, out + R / 2 * w_.out_stride);
    } else {
      constexpr int kLines = max_of(1, min_of(4, kAccumulators / (R * L::kVecs)));
      const int64_t dim = p_.v_head_dim;
      int64_t d = 0;
      for (; d + kLines * L::kElems <= dim; d += kLines * L::kElems)
        add_lines<R, kFirst, kLines, false>(probs, rows, count, out, d, 0);
      for (; kLines > 2 && d + 2 * L::kElems <= dim; d += 2 * L::kElems)
        add_lines<R, kFirst, 2, false>(probs, rows, count, out, d, 0);
      for (; d + L::kElems <= dim; d += L::kElems)
        add_lines<R, kFirst, 1, false>(probs, rows, count, out, d, 0);
      if (d < dim)
        add_lines<R, kFirst, 1, true>(probs, rows, count, out, d, static_cast<int>(dim - d));
    }
  }

  template <int R, bool kFirst, int kLines, bool kTail>
  void add_lines(const Prob* probs, const T* const* rows, int64_t count, float* out, int64_t d,
                 int tail) {
    constexpr int kVecs = kLines * L::kVecs;
    Vec sums[R * kVecs];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVecs; ++c)
        sums[r * kVecs + c] = load(out + r * w_.out_stride + d + c * kWidth);
    LinesAhead ahead = steps_.lines_ahead().skip(d / L::kElems * round_up(count, kTokenGroup));
    for (int64_t t = 0; t < count; t += L::kTokens) {
      if constexpr (kFirst) ahead.prefetch<L::kTokens * kLines>();
      L::template accumulate<R, kLines, kTail>(sums, probs + t, kMaxTile, rows + t, d, tail);
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVecs; ++c)
        store(out + r * w_.out_stride + d + c * kWidth, sums[r * kVecs + c]);
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
      const bool has_sink = !partial && p_.sinks != nullptr;
      const Normalizer n = normalize(w_.maxima[state], reduce_add(load(w_.sums + state * kWidth)),
                                     has_sink ? p_.sinks + q_head : nullptr);
      (partial ? item_.partial_lse : p_.lse)[place] = n.lse;
      const int64_t at = place * p_.v_head_dim;
      if (partial)
        store_scaled(item_.partial_out + at, from, n.scale, p_.v_head_dim);
      else
        store_scaled(static_cast<T*>(p_.out) + at, from, n.scale, p_.v_head_dim);
    }
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
  StepQueue<T> steps_;
  const KvRange all_see_;
};

template <class T>
int64_t workspace_bytes(const AttentionParams& p) {
  return Workspace<T>(p, p.num_kv_heads, kMaxDecodeRows, nullptr).bytes;
}

}  // namespace

void decode(const AttentionParams& p, const AttentionItem& item, void* scratch) {
  switch (p.q_dtype) {
    case DType::kBFloat16:
      return Decode<BFloat16>(p, item, scratch).run();
    case DType::kFloat16:
      return Decode<Float16>(p, item, scratch).run();
    default:
      return Decode<float>(p, item, scratch).run();
  }
}

DecodeShape decode_shape(const AttentionParams& p) {
  return decode_shape_of(p.launch, max_of(p.head_dim, p.v_head_dim) * element_size(p.q_dtype));
}

int64_t decode_scratch_bytes(const AttentionParams& p) {
  switch (p.q_dtype) {
    case DType::kBFloat16:
      return workspace_bytes<BFloat16>(p);
    case DType::kFloat16:
      return workspace_bytes<Float16>(p);
    default:
      return workspace_bytes<float>(p);
  }
}

}  // namespace pykvcache::KV_ISA
