// Attention of a few query rows over a paged cache: decode and speculative decode. The work is a
// stream of (tile of tokens, KV head) steps, heads innermost, so that the blocks of a tile are read
// through once; each step prefetches the rows of the next one while it computes. Per step:
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
        tile_tokens_(tile_tokens(p)),
        w_(p, item.head_end - item.head_begin, query_rows_, scratch) {}

  void run() {
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) begin_head(head);
    TokenCursor cursor(p_, item_.row, item_.kv_begin, item_.kv_end);
    Tile tiles[2];
    TileRows<T> rows[2];
    int tile = 0, step = 0;
    fill(cursor, tiles[0]);
    locate(tiles[0], item_.head_begin, rows[0]);
    while (tiles[tile].count > 0) {
      fill(cursor, tiles[1 - tile]);
      for (int64_t head = item_.head_begin; head < item_.head_end; ++head, step ^= 1) {
        const bool same_tile = head + 1 < item_.head_end;
        const Tile& next = tiles[same_tile ? tile : 1 - tile];
        locate(next, same_tile ? head + 1 : item_.head_begin, rows[1 - step]);
        touch_pages(next, rows[1 - step]);
        attend(tiles[tile], head, rows[step], rows[1 - step]);
      }
      tile = 1 - tile;
    }
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) finish_head(head);
  }

 private:
  using L = Line<T>;
  using Query = typename L::Query;
  using Prob = typename L::Prob;

  static int64_t tile_tokens(const AttentionParams& p) {
    const int64_t row_bytes = (p.head_dim + p.v_head_dim) * static_cast<int64_t>(sizeof(T));
    return max_of(kTokenGroup,
                  min_of(kMaxTile, kTileBytes / row_bytes / kTokenGroup * kTokenGroup));
  }

  // Calls f<R>(row) for groups of 4, 2 or 1 rows; a group of 4 may end in one padding row.
  template <class F>
  KV_INLINE void for_row_groups(int64_t rows, F f) {
    for (int64_t row = 0; row < rows; row += 4) {
      if (rows - row >= 3)
        f.template operator()<4>(row);
      else if (rows - row == 2)
        f.template operator()<2>(row);
      else
        f.template operator()<1>(row);
    }
  }

  int64_t local(int64_t head) const { return head - item_.head_begin; }
  float* out_row(int64_t head, int64_t row) const {
    return w_.out + (local(head) * w_.rows + row) * w_.out_stride;
  }

  void fill(TokenCursor& cursor, Tile& tile) const {
    tile.count = cursor.take(tile_tokens_, tile.positions, tile.k_offsets, tile.v_offsets);
    tile.num_pages = 0;
    int64_t last_page = -1;
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t page = tile.k_offsets[t] * static_cast<int64_t>(sizeof(T)) / kPageBytes;
      if (page != last_page) tile.pages[tile.num_pages++] = static_cast<int32_t>(t);
      last_page = page;
    }
  }

  // Starts the page walks of a step all at once, well before its rows are prefetched one by one.
  void touch_pages(const Tile& tile, const TileRows<T>& rows) const {
    for (int64_t i = 0; i < tile.num_pages; ++i) {
      __builtin_prefetch(rows.k[tile.pages[i]]);
      __builtin_prefetch(rows.v[tile.pages[i]]);
    }
  }

  void locate(const Tile& tile, int64_t head, TileRows<T>& rows) const {
    const T* k = head_base<T>(p_.k, head);
    const T* v = head_base<T>(p_.v, head);
    const T* zeros = reinterpret_cast<const T*>(kZeroRow);
    for (int64_t t = 0; t < tile.count; ++t) rows.k[t] = k + tile.k_offsets[t];
    for (int64_t t = 0; t < tile.count; ++t) rows.v[t] = v + tile.v_offsets[t];
    for (int64_t t = tile.count; t < tile_tokens_; ++t) rows.k[t] = rows.v[t] = zeros;
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

  void attend(const Tile& tile, int64_t head, const TileRows<T>& rows, const TileRows<T>& next) {
    const int64_t padded = round_up(tile.count, kTokenGroup);
    const Query* queries = w_.queries + local(head) * w_.rows * w_.q_stride;
    for_row_groups(query_rows_, [&]<int R>(int64_t row) {
      score<R>(queries + row * w_.q_stride, rows.k, row == 0 ? next.k : nullptr, padded,
               w_.scores + row * kMaxTile);
    });
    for (int64_t row = 0; row < query_rows_; ++row) softmax(tile, head, row, padded);
    for_row_groups(query_rows_, [&]<int R>(int64_t row) {
      add_values<R>(w_.probs + row * kMaxTile, rows.v, row == 0 ? next.v : nullptr, tile.count,
                    out_row(head, row));
    });
  }

  template <int R>
  void score(const Query* queries, const T* const* rows, const T* const* next, int64_t count,
             float* scores) const {
    constexpr int N = kAccumulators / R;
    const int64_t whole = p_.head_dim / L::kElems * L::kElems;
    const auto tail = static_cast<int>(p_.head_dim - whole);
    for (int64_t t = 0; t < count; t += N) {
      if (next != nullptr) prefetch_rows(next + t, N, p_.head_dim);
      Vec sums[kAccumulators] = {};
      for (int64_t d = 0; d < whole; d += L::kElems)
        L::template dot<R, N, false>(sums, queries, w_.q_stride, rows + t, d, L::kElems);
      if (tail > 0) L::template dot<R, N, true>(sums, queries, w_.q_stride, rows + t, whole, tail);
      float lanes[kAccumulators];
      for (int first = 0; first < kAccumulators; first += kWidth)
        store(lanes + first, reduce_rows(reinterpret_cast<const Vec(&)[kWidth]>(sums[first])));
      for (int r = 0; r < R; ++r)
        __builtin_memcpy(scores + r * kMaxTile + t, lanes + r * N, N * sizeof(float));
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
    const KvRange keys = visible_keys(p_, first_position_ + row / group_, seq_len_);
    if (tile.positions[0] < keys.begin || tile.positions[tile.count - 1] >= keys.end)
      for (int64_t t = 0; t < tile.count; ++t)
        if (tile.positions[t] < keys.begin || tile.positions[t] >= keys.end) scores[t] = -kInfinity;
    for (int64_t t = tile.count; t < padded; ++t) scores[t] = -kInfinity;

    const int64_t state = local(head) * w_.rows + row;
    float* sums = w_.sums + state * kWidth;
    Vec highest = broadcast(-kInfinity);
    for (int64_t t = 0; t < padded; t += kWidth) highest = max(highest, load(scores + t) * factor);
    if (any_greater(highest, broadcast(w_.maxima[state] + kMaxLag)))
      raise_max(head, row, reduce_max(highest));
    const Vec shift = broadcast(w_.maxima[state]);
    Vec sum = load(sums);
    Prob* probs = w_.probs + row * kMaxTile;
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
  template <int R>
  void add_values(const Prob* probs, const T* const* rows, const T* const* next, int64_t count,
                  float* out) const {
    if constexpr (R > 1 && R * L::kVecs > kAccumulators) {
      add_values<R / 2>(probs, rows, next, count, out);
      add_values<R / 2>(probs + R / 2 * kMaxTile, rows, nullptr, count,
                        out + R / 2 * w_.out_stride);
    } else {
      constexpr int kLines = max_of(1, min_of(4, kAccumulators / (R * L::kVecs)));
      const int64_t dim = p_.v_head_dim;
      LineStream<T> ahead{next, next == nullptr ? next : next + tile_tokens_, dim};
      int64_t d = 0;
      for (; d + kLines * L::kElems <= dim; d += kLines * L::kElems)
        add_lines<R, kLines, false>(probs, rows, ahead, count, out, d, 0);
      for (; kLines > 2 && d + 2 * L::kElems <= dim; d += 2 * L::kElems)
        add_lines<R, 2, false>(probs, rows, ahead, count, out, d, 0);
      for (; d + L::kElems <= dim; d += L::kElems)
        add_lines<R, 1, false>(probs, rows, ahead, count, out, d, 0);
      if (d < dim)
        add_lines<R, 1, true>(probs, rows, ahead, count, out, d, static_cast<int>(dim - d));
    }
  }

  template <int R, int kLines, bool kTail>
  void add_lines(const Prob* probs, const T* const* rows, LineStream<T>& ahead, int64_t count,
                 float* out, int64_t d, int tail) const {
    constexpr int kVecs = kLines * L::kVecs;
    Vec sums[R * kVecs];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVecs; ++c)
        sums[r * kVecs + c] = load(out + r * w_.out_stride + d + c * kWidth);
    LineStream<T> next = ahead;  // a copy that lives in registers
    for (int64_t t = 0; t < count; t += L::kTokens) {
      next.prefetch(L::kTokens * kLines);
      L::template accumulate<R, kLines, kTail>(sums, probs + t, kMaxTile, rows + t, d, tail);
    }
    ahead = next;
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
  const int64_t tile_tokens_;
  Workspace<T> w_;
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
