// Decode of one query row a KV head over blocks whose rows lie together. Two blocks of a sequence
// are read at once, each from its first byte to its last: K of every head, then V of every head.
// Few loads, each with a stride of its own that never changes, make two streams that the
// processor's prefetchers follow through a block; what these cannot foresee, where a stream goes on
// after a jump, is prefetched by software. With grouped heads there is so much arithmetic between
// two loads that prefetching every line, as decode_tile.h does, is faster.
//
//   tile   tokens [0, stream) of one block and [stream, 2 * stream) of the next
//   batch  heads whose keys are multiplied before the softmax of the first: 64 tokens of a stream
#pragma once

#include "cpu/kernels/decode_state.h"

namespace pykvcache::KV_ISA {

constexpr int64_t kMostAheadLines = 64;      // of the next region, a stream
constexpr int64_t kLeastRunBytes = 4 << 10;  // of one head in a block, to be streamed

KV_INLINE int64_t stream_tokens(int64_t block_size) {
  return max_of(kTokenGroup, min_of(kMaxTokens / 2, block_size / kTokenGroup * kTokenGroup));
}

// Lines of a row of K and V when items of so many query rows are streamed, otherwise 0. Only for
// wide vectors, where it was measured, and where nobody asked for another tile.
KV_INLINE int64_t streamed_lines(const AttentionParams& p, int64_t query_rows) {
  const int64_t row_bytes = p.head_dim * element_size(p.k.dtype);
  const bool fits =
      (row_bytes == 2 * kLineBytes || row_bytes == 4 * kLineBytes || row_bytes == 8 * kLineBytes) &&
      p.k.stride_slot == p.head_dim && p.v.stride_slot == p.head_dim;
  if (kWidth < 16 || p.k.dtype == DType::kFloat8E4M3 || query_rows != 1 ||
      p.head_dim != p.v_head_dim || !fits || p.launch.tile > 0 || p.launch.stages > 0)
    return 0;
  return min_of(p.block_size, kMaxTokens / 2) * row_bytes >= kLeastRunBytes ? row_bytes / kLineBytes
                                                                            : 0;
}

// Where the streams continue after a jump.
struct Starts {
  const char* a = nullptr;
  const char* b = nullptr;

  void prefetch(int64_t lines) {
    if (a == nullptr) return;
    for (int64_t i = 0; i < lines; ++i, a += kLineBytes, b += kLineBytes) {
      __builtin_prefetch(a);
      __builtin_prefetch(b);
    }
  }
};

template <class T, int kLines>
class StreamedDecode : public DecodeState<T> {
 public:
  StreamedDecode(const AttentionParams& p, const AttentionItem& item, void* scratch)
      : State(p, item, scratch),
        stream_(stream_tokens(p.block_size)),
        batch_(kMaxTokens / 2 / stream_),
        ahead_lines_(min_of(kMostAheadLines, stream_ * kLines)) {}

  void run() {
    TokenCursor cursor(p_, item_.row, item_.kv_begin, item_.kv_end);
    take(cursor, tiles_[0]);
    this->begin();
    for (int current = 0; tiles_[current].count > 0; current ^= 1) {
      take(cursor, tiles_[current ^ 1]);
      attend(tiles_[current], tiles_[current ^ 1]);
    }
    this->finish();
  }

 private:
  using State = DecodeState<T>;
  using State::item_, State::p_, State::w_;
  using State::out_row, State::prob_row, State::queries, State::softmax;
  using typename State::L, typename State::Prob, typename State::Query;

  // Past the tile's count the last token is repeated: its rows may be read, with weight 0.
  void take(TokenCursor& cursor, Tile& tile) {
    tile.count = cursor.take(2 * stream_, tile.positions, tile.k.offsets, tile.v.offsets);
    for (int64_t t = max_of<int64_t>(1, tile.count); t < 2 * stream_; ++t) {
      tile.k.offsets[t] = tile.k.offsets[t - 1];
      tile.v.offsets[t] = tile.v.offsets[t - 1];
    }
    fetch_page_entries<T>(tile, item_, p_);
  }

  Starts starts(const Tile& tile, const TileSide& side, const CacheView& cache,
                int64_t head) const {
    if (tile.count == 0) return {};
    const T* base = head_base<T>(cache, head);
    return {reinterpret_cast<const char*>(base + side.offsets[0]),
            reinterpret_cast<const char*>(base + side.offsets[stream_])};
  }

  void attend(const Tile& tile, const Tile& next) {
    const int64_t last = max_of(item_.head_begin, item_.head_end - batch_);
    for (int64_t head = item_.head_begin; head < item_.head_end; head += batch_) {
      const int64_t end = min_of(head + batch_, item_.head_end);
      weigh(tile, head, end,
            end < item_.head_end ? starts(tile, tile.k, p_.k, end)
                                 : starts(tile, tile.v, p_.v, item_.head_begin));
    }
    Starts ahead = starts(next, next.k, p_.k, item_.head_begin);
    const int64_t lines = ceil_div(ahead_lines_, item_.head_end - last);
    for (int64_t head = item_.head_begin; head < item_.head_end; ++head) {
      if (head >= last) ahead.prefetch(lines);
      add_values(tile, head);
    }
  }

  int64_t in_first(const Tile& tile) const { return min_of(stream_, tile.count); }
  int64_t in_second(const Tile& tile) const { return max_of<int64_t>(0, tile.count - stream_); }

  // Weights of the heads [begin, end): first the products of all, so that loads follow each other
  // without a pause, then their sums.
  void weigh(const Tile& tile, int64_t begin, int64_t end, Starts ahead) {
    alignas(64) float products[kMaxTokens * kWidth];  // [heads, 2 * stream_, kWidth]
    const int64_t of_head = 2 * stream_ * kWidth;
    const int64_t padded = round_up(tile.count, kTokenGroup);
    const int64_t lines = ceil_div(ahead_lines_, end - begin);
    for (int64_t head = begin; head < end; ++head)
      multiply(tile, head, products + (head - begin) * of_head);
    for (int64_t head = begin; head < end; ++head) {
      ahead.prefetch(lines);
      const float* from = products + (head - begin) * of_head;
      for (int64_t t = 0; t < padded; t += kWidth) {
        Vec rows[kWidth];
        for (int i = 0; i < kWidth; ++i) rows[i] = load(from + (t + i) * kWidth);
        store(w_.scores + t, reduce_rows(rows));
      }
      softmax(tile, head, 0, padded, w_.scores);
    }
  }

  // The products of q and every key, each still to be summed over its lanes.
  void multiply(const Tile& tile, int64_t head, float* products) {
    Query q[kLines * L::kElems];
    __builtin_memcpy(q, queries(head), sizeof(q));
    const T* base = head_base<T>(p_.k, head);
    const int64_t* first = tile.k.offsets;
    const int64_t* second = first + stream_;
    const int64_t both = in_second(tile), count = in_first(tile);
    int64_t t = 0;
#pragma GCC unroll 1
    for (; t < both; ++t) {
      multiply(q, base + first[t], products + t * kWidth);
      multiply(q, base + second[t], products + (stream_ + t) * kWidth);
    }
#pragma GCC unroll 1
    for (; t < count; ++t) multiply(q, base + first[t], products + t * kWidth);
  }

  KV_INLINE void multiply(const Query* q, const T* row, float* product) {
    const auto no_tick = []() __attribute__((always_inline)) {};
    Vec sum[1] = {zero()};
    for (int line = 0; line < kLines; ++line)
      L::template dot<1, 1, false>(sum, q, 0, &row, line * L::kElems, L::kElems, no_tick);
    store(product, sum[0]);
  }

  // The weighted sum of a head's values.
  void add_values(const Tile& tile, int64_t head) {
    constexpr int kVecs = kLines * L::kVecs;
    const T* base = head_base<T>(p_.v, head);
    const int64_t* first = tile.v.offsets;
    const int64_t* second = first + stream_;
    const int64_t both = in_second(tile), count = in_first(tile);
    const Prob* probs = prob_row(head, 0);
    float* out = out_row(head, 0);
    Vec sums[kVecs];
    for (int c = 0; c < kVecs; ++c) sums[c] = load(out + c * kWidth);
    int64_t t = 0;
#pragma GCC unroll 1
    for (; t < both; t += L::kTokens) {
      add(sums, probs + t, base, first + t);
      add(sums, probs + stream_ + t, base, second + t);
    }
#pragma GCC unroll 1
    for (; t < count; t += L::kTokens) add(sums, probs + t, base, first + t);
    for (int c = 0; c < kVecs; ++c) store(out + c * kWidth, sums[c]);
  }

  template <int N>
  KV_INLINE void add(Vec (&sums)[N], const Prob* probs, const T* base, const int64_t* offsets) {
    const T* rows[L::kTokens];
    for (int i = 0; i < L::kTokens; ++i) rows[i] = base + offsets[i];
    L::template accumulate<1, kLines, false>(sums, probs, 0, rows, 0, 0);
  }

  const int64_t stream_;       // tokens that a tile takes from each of two blocks
  const int64_t batch_;        // heads whose keys are read before their softmax
  const int64_t ahead_lines_;  // that are prefetched where a stream jumps
  Tile tiles_[2];
};

}  // namespace pykvcache::KV_ISA
