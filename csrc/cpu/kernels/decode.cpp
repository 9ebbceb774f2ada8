// Attention of a few query rows over a paged cache: decode and speculative decode. Two kernels that
// differ in the order in which they read: StreamedDecode (decode_streams.h) for blocks whose rows
// lie together, and here the general one. Tile by tile of tokens, K of every head and then V of
// every head, which is the order in which a block lies in memory; decode_tile.h has the order and
// the prefetching. For each head of a tile:
//   scores  [rows, tile]  q . k, transposed sums of kAccumulators dot products at a time
//   softmax [rows, tile]  online; sums are rescaled only when the maximum has grown a lot
//   values  [rows, Dv]    p . v, added to the head's accumulators
// rows are the q_len * G query rows of a KV head, query-major. Needs AttentionItem as kernels.h
// says.
#include "cpu/kernels.h"
#include "cpu/kernels/decode_state.h"
#include "cpu/kernels/decode_streams.h"
#include "cpu/kernels/decode_tile.h"
#include "cpu/kernels/line.h"
#include "cpu/numeric.h"

namespace pykvcache::KV_ISA {
namespace {

template <class T>
class Decode : public DecodeState<T> {
 public:
  Decode(const AttentionParams& p, const AttentionItem& item, void* scratch)
      : DecodeState<T>(p, item, scratch), steps_(p, item) {}

  void run() {
    this->begin();
    while (steps_.current().tile->count > 0) {
      for (int64_t head = item_.head_begin; head < item_.head_end; ++head, steps_.advance())
        weigh(steps_.current(), head);
      for (int64_t head = item_.head_begin; head < item_.head_end; ++head, steps_.advance())
        add_values(steps_.current(), head);
    }
    this->finish();
  }

 private:
  using State = DecodeState<T>;
  using State::item_, State::p_, State::query_rows_, State::w_;
  using State::out_row, State::prob_row, State::queries, State::score_row, State::softmax;
  using typename State::L, typename State::Prob, typename State::Query;

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

  // Scores of a head's keys and their weights in the softmax.
  void weigh(const Step<T>& keys, int64_t head) {
    const int64_t padded = round_up(keys.tile->count, kTokenGroup);
    const Query* first = queries(head);
    for_row_groups(query_rows_, [&]<int R, bool kFirst>(int64_t row) {
      score<R, kFirst>(first + row * w_.q_stride, keys.rows, padded, score_row(row));
    });
    this->take_scales(*keys.tile, head);
    for (int64_t row = 0; row < query_rows_; ++row)
      softmax(*keys.tile, head, row, padded, score_row(row));
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
      for (int r = 0; r < R; ++r) store(scores + r * kMaxTokens, parts[r]);
    } else {
      float lanes[kParts * kWidth];
      for (int i = 0; i < kParts; ++i) store(lanes + i * kWidth, parts[i]);
      for (int part = 0; part < R; ++part)
        for (int r = 0; r < R; ++r)
          __builtin_memcpy(scores + r * kMaxTokens + part * N, lanes + (part * R + r) * N,
                           N * sizeof(float));
    }
  }

  // As many rows at once as fit the registers with the accumulators of a line each.
  template <int R, bool kFirst>
  void add_values(const Prob* probs, const T* const* rows, int64_t count, float* out) {
    if constexpr (R > 1 && R * L::kVecs > kAccumulators) {
      add_values<R / 2, kFirst>(probs, rows, count, out);
      add_values<R / 2, false>(probs + R / 2 * kMaxTokens, rows, count,
                               out + R / 2 * w_.out_stride);
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
      L::template accumulate<R, kLines, kTail>(sums, probs + t, kMaxTokens, rows + t, d, tail);
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVecs; ++c)
        store(out + r * w_.out_stride + d + c * kWidth, sums[r * kVecs + c]);
  }

  StepQueue<T> steps_;
};

template <class T>
void decode_as(const AttentionParams& p, const AttentionItem& item, void* scratch) {
  const int64_t query_rows = (item.q_end - item.q_begin) * (p.num_heads / p.num_kv_heads);
  if constexpr (Line<T>::kScaled) return Decode<T>(p, item, scratch).run();
  switch (streamed_lines(p, query_rows)) {
    case 2:
      return StreamedDecode<T, 2>(p, item, scratch).run();
    case 4:
      return StreamedDecode<T, 4>(p, item, scratch).run();
    case 8:
      return StreamedDecode<T, 8>(p, item, scratch).run();
    default:
      return Decode<T>(p, item, scratch).run();
  }
}

// Calls f with a value of the type that the kernels are compiled for: that of the caches.
template <class F>
auto with_cache_type(const AttentionParams& p, F f) {
  switch (p.k.dtype) {
    case DType::kFloat8E4M3:
#ifdef KV_FLOAT8_PAIRS
      if (p.q_dtype == DType::kBFloat16) return f(Float8Pairs{});
#endif
      return f(Float8{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

template <class T>
int64_t workspace_bytes(const AttentionParams& p) {
  return Workspace<T>(p, p.num_kv_heads, kMaxDecodeRows, nullptr).bytes;
}

}  // namespace

void decode(const AttentionParams& p, const AttentionItem& item, void* scratch) {
  with_cache_type(p, [&]<class T>(T) { decode_as<T>(p, item, scratch); });
}

DecodeShape decode_shape(const AttentionParams& p) {
  const int64_t row_bytes = max_of(p.head_dim, p.v_head_dim) * element_size(p.k.dtype);
  if (streamed_lines(p, p.num_heads / p.num_kv_heads) > 0)
    return {2 * stream_tokens(p.block_size), 0};
  return decode_shape_of(p.launch, row_bytes);
}

int64_t decode_scratch_bytes(const AttentionParams& p) {
  return with_cache_type(p, [&]<class T>(T) { return workspace_bytes<T>(p); });
}

}  // namespace pykvcache::KV_ISA
