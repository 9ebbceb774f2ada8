// Decode: sequences with few query rows, cut along their keys over persistent CTAs.
//
//   grid (programs, HKV x row tiles)   CTA p takes its share of the plan's units for 16 query rows
//   block: kWarps warps; warp w takes keys [16 w, 16 w + 16) of every 16 kWarps keys
//
// All heads of a KV head's group are rows of one MMA, so that K and V are read once for them. Each
// warp has a ring of kStages stages of its own and waits for nobody until the end of a piece, when
// the warps' softmax states are combined. A piece that is a whole row becomes output; other pieces
// go to the workspace, and merge.cuh combines them.
//
// Read first: plan.cuh, warp_attention.cuh, key_copy.cuh. Read next: merge.cuh.
#pragma once

#include "cuda/key_copy.cuh"
#include "cuda/plan.cuh"

namespace pykvcache::cuda {

// Stages of 16 keys that a warp has. Three of 2-byte rows are 96 KiB a CTA for kDim 128 and 256.
template <class KV>
constexpr int kUsualStages = sizeof(KV) == 1 ? 5 : 3;

template <class T, class KV, int kDim, int kStages = kUsualStages<KV>>
struct Decode {
  static constexpr int kWarps = kDim <= 128 ? 4 : 2;
  static constexpr int kResidentCtas = kDim <= 64 ? 3 : 2;  // at least, of a processor
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStep = kGroupKeys * kWarps;  // keys
  static_assert(kUnit % kStep == 0);

  using Stage = KeyStage<KV, kDim, kGroupKeys>;
  static constexpr bool kHoldsQueries = kDim <= 128;
  using Attention = WarpAttention<T, KV, kDim, 1, kHoldsQueries>;
  using Tile = SharedTile<T, KV, kDim>;

  // Shared memory: q (if registers hold it, it passes through the rings), then every warp's ring,
  // what belongs to the rings, states, and units of q's rows. At the end of a piece a warp's values
  // [16, kDim] take the place of its ring.
  static constexpr int kQueryBytes = kHoldsQueries ? 0 : kRowTile * Tile::kQueryBytes;
  static constexpr int kRingBytes = kStages * Stage::kRowsBytes;
  static constexpr int kExtras = kWarps * kStages;
  static constexpr int kSharedBytes =
      kQueryBytes + kWarps * kRingBytes +
      kExtras * static_cast<int>(sizeof(typename Stage::Extras)) +
      kWarps * kRowTile * static_cast<int>(sizeof(SoftmaxState)) +
      (Tile::kFloat8 ? kRowTile : 0) * static_cast<int>(sizeof(float));
  static_assert(kRingBytes >= kRowTile * kDim * static_cast<int>(sizeof(float)));

  unsigned char* shared = dynamic_shared();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;

  __device__ __forceinline__ unsigned char* ring(int w) const {
    return shared + kQueryBytes + w * kRingBytes;
  }
  __device__ __forceinline__ Stage stage(int index) const {
    auto* extras = reinterpret_cast<typename Stage::Extras*>(ring(kWarps));
    return {ring(warp) + index * Stage::kRowsBytes, extras + warp * kStages + index};
  }
  __device__ __forceinline__ float* piece_values(int w) const {  // [16, kDim]
    return reinterpret_cast<float*>(ring(w));
  }
  // Where a value lies in them: rows that are stored together use different banks.
  __device__ __forceinline__ static int value_place(int row, int dim) {
    return row * kDim + (dim ^ (row & 1) << 4 ^ (row & 2) << 2);
  }
  __device__ __forceinline__ SoftmaxState* piece_states(int w) const {  // [16]
    auto* end = ring(kWarps) + kExtras * sizeof(typename Stage::Extras);
    return reinterpret_cast<SoftmaxState*>(end) + w * kRowTile;
  }

  __device__ __forceinline__ float* query_units() const {  // [16]
    return reinterpret_cast<float*>(piece_states(kWarps));
  }

  // Keys [begin, end) of a sequence against its row tile; leaves the warps' states in shared
  // memory.
  __device__ __forceinline__ void attend_piece(const KernelParams& params, const WarpRows& rows,
                                               int32_t begin, int32_t end) const {
    stage_queries<T, KV, kDim>(params, rows, kRowTile, shared, query_units());
    // q is written by all threads before any warp reads it.
    KV_OMITTABLE(decode_query_barrier, __syncthreads());

    Attention attention;
    attention.start(params, rows, lane);
    if constexpr (kHoldsQueries) {
      attention.hold_queries(shared, lane);
      // All warps hold q before a ring overwrites it.
      KV_OMITTABLE(decode_ring_barrier, __syncthreads());
    }
    const float scale = params.attention.scale * head_scale(params.attention.k_scale, rows.kv_head);
    // Groups of 16 keys are dealt to warps by their position, wherever the piece begins.
    const int32_t first = begin / kStep * kStep + warp * kGroupKeys;
    const int32_t count = end > first ? (end - first + kStep - 1) / kStep : 0;
    KeyCopier<KV, kDim> copier(params, lane);
    copier.start(rows.sequence, rows.kv_head, first, kStep);
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) copier.copy(stage(i), 0);
      copy_commit();
    }
    int current = 0, refilled = kStages - 1;
    for (int32_t i = 0; i < count; ++i) {
      // This lane's part of group i is there;
      KV_OMITTABLE(decode_wait, copy_wait<kStages - 2>());
      // so are the other lanes' parts, and all have read the stage that is refilled now.
      KV_OMITTABLE(decode_warp_barrier, __syncwarp());
      if (i + kStages - 1 < count) copier.copy(stage(refilled), 0);
      copy_commit();
      attention.template attend<kGroupKeys>(params, rows, shared, query_units(),
                                            stage(current).tile(first + i * kStep, 0, 1), scale,
                                            lane);
      refilled = current;
      current = current + 1 == kStages ? 0 : current + 1;
    }
    copy_wait<0>();
    attention.finish(params);
    // Every lane has read the ring that the values overwrite.
    KV_OMITTABLE(decode_value_barrier, __syncwarp());
    store_state(attention);
  }

  __device__ __forceinline__ void store_state(const Attention& attention) const {
    float* values = piece_values(warp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Attention::row_of(0, half, lane);
#pragma unroll
      for (int tile = 0; tile < kDim / 8; tile += Tile::kFloat8 ? 2 : 1) {
        float* to = values + value_place(row, Tile::value_dim(tile, lane, 0));
        const float first = attention.values[0][tile][2 * half];
        const float second = attention.values[0][tile][2 * half + 1];
        if constexpr (Tile::kFloat8)  // the next tile has the dims between
          *reinterpret_cast<float4*>(to) = {first, attention.values[0][tile + 1][2 * half], second,
                                            attention.values[0][tile + 1][2 * half + 1]};
        else
          *reinterpret_cast<float2*>(to) = {first, second};
      }
      if (lane % 4 == 0) piece_states(warp)[row] = attention.state[0][half];
    }
  }

  // Combines the warps' states and writes the piece: to the output if it is `whole`, else to
  // `slot`.
  template <class Out>
  __device__ __forceinline__ void write_piece(const KernelParams& params, const WarpRows& rows,
                                              bool whole, int64_t slot) const {
    const AttentionParams& p = params.attention;
    const auto dim = static_cast<int32_t>(p.v_head_dim);
    const float value_scale = head_scale(p.v_scale, rows.kv_head);
    // A slot has room for merged_rows; more come only of a max_seqlen_q that is too small.
    const int32_t end = whole                           ? rows.end
                        : rows.end < params.merged_rows ? rows.end
                                                        : params.merged_rows;
    for (int row = warp; row < kRowTile && rows.first + row < end; row += kWarps) {
      const QueryRow query = query_row(params, rows.sequence, rows.kv_head, rows.first + row);
      SoftmaxState total;
      for (int w = 0; w < kWarps; ++w) total.raise(piece_states(w)[row].highest);
      float weights[kWarps];
      for (int w = 0; w < kWarps; ++w) {
        const SoftmaxState part = piece_states(w)[row];
        weights[w] = total.weight(part);
        total.sum += part.sum * weights[w];
      }
      float factor = value_scale;
      if (whole) {
        if (p.sinks != nullptr) factor *= total.add_sink(p.sinks[query.head]);
        factor *= total.normalizer();
      }
      const int64_t place =
          whole ? output_place(p, rows.sequence, query)
                : (slot * p.num_kv_heads + rows.kv_head) * params.merged_rows + rows.first + row;
      for (int d = lane; d < dim; d += 32) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += weights[w] * piece_values(w)[value_place(row, d)];
        if (whole)
          static_cast<Out*>(p.out)[place * dim + d] = from_float<Out>(sum * factor);
        else
          params.part_values[place * dim + d] = sum * factor;
      }
      if (lane == 0 && whole) p.lse[place] = total.lse();
      if (lane == 0 && !whole) params.part_states[place] = total;
    }
  }

  // Plan entries [entry, entry_end) of one row.
  __device__ __forceinline__ void run_piece(const KernelParams& params, int32_t row, int32_t entry,
                                            int32_t entry_end) const {
    const AttentionParams& p = params.attention;
    const int32_t row_begin = params.plan[row], row_end = params.plan[row + 1];
    const int32_t kv_head = blockIdx.y % static_cast<int32_t>(p.num_kv_heads);
    WarpRows rows;
    rows.sequence = load_sequence(p, row);
    rows.kv_head = kv_head;
    rows.first = blockIdx.y / static_cast<int32_t>(p.num_kv_heads) * kRowTile;
    rows.end = rows.sequence.q_len * static_cast<int32_t>(params.group.divisor);
    if (rows.first >= rows.end) return;
    const UnitRange units = visible_units(p, rows.sequence);
    const int32_t first = units.begin / params.piece_units - row_begin;  // entry 0 is piece `first`
    const int32_t piece_keys = params.piece_units * kUnit;
    const int32_t begin = max_of(units.begin * kUnit, (first + entry) * piece_keys);
    const int32_t end = min_of(rows.sequence.kv_len, (first + entry_end) * piece_keys);
    attend_piece(params, rows, begin, end);
    // All warps' states are written before any is read.
    KV_OMITTABLE(decode_state_barrier, __syncthreads());
    const bool whole = entry == row_begin && entry_end == row_end;
    const int64_t slot = params.piece_units > 1 ? entry : blockIdx.x + row;
    if (Tile::kFloat8 && p.q_dtype == DType::kBFloat16)
      write_piece<BFloat16>(params, rows, whole, slot);
    else
      write_piece<T>(params, rows, whole, slot);
    // States and q are read before the next piece overwrites them.
    KV_OMITTABLE(decode_piece_barrier, __syncthreads());
  }

  __device__ __forceinline__ static int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
  __device__ __forceinline__ static int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }

  __device__ __forceinline__ void run(const KernelParams& params) const {
    const auto rows = static_cast<int32_t>(params.attention.batch);
    const int32_t entries = params.plan[rows];
    if (params.piece_units > 1) {  // every entry is a piece of its own
      for (int32_t entry = blockIdx.x; entry < entries; entry += gridDim.x)
        run_piece(params, find_row_together(params.plan, rows, entry, lane), entry, entry + 1);
      return;
    }
    const int32_t sharing = sharing_programs(params, entries);
    int32_t entry = share_begin(blockIdx.x, entries, sharing);
    const int32_t stop = share_begin(blockIdx.x + 1, entries, sharing);
    for (int32_t row = find_row_together(params.plan, rows, entry, lane); entry < stop; ++row) {
      const int32_t end = min_of(stop, params.plan[row + 1]);
      if (end > entry) run_piece(params, row, entry, end);
      entry = max_of(entry, end);
    }
  }
};

}  // namespace pykvcache::cuda
