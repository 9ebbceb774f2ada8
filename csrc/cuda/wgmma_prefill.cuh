// Prefill on Hopper: the same rows and keys as prefill.cuh with wgmma and TMA, warps specialised
// (FlashAttention-3, Shah et al., 2024) over blocks.
//
//   block: kConsumers warpgroups of 64 query rows each, and one that copies keys
//
// Consumers keep scores, weights and values in registers. Products of a tile of values and of the
// next tile of scores are in flight together, and consumers take turns to issue them, so that the
// tensor cores work while others take exponentials:
//
//   consumer 0   q K(i)^T, w V(i-1) | softmax of tile i         | q K(i+1)^T, w V(i) | ...
//   consumer 1   softmax of i - 1   | q K(i)^T, w V(i-1)        | softmax of tile i  | ...
//
// Read first: hopper.cuh, warpgroup_tile.cuh, warpgroup_softmax.cuh, warpgroup_stages.cuh.
#pragma once

#include "cuda/box_copier.cuh"
#include "cuda/key_gatherer.cuh"

namespace pykvcache::cuda {

template <class T, int kDim>
struct WarpgroupPrefill {
  using Stages = WarpgroupStages<kDim>;
  using Queries = typename Stages::Queries;
  using Keys = typename Stages::Tile;
  using Softmax = typename Stages::Softmax;
  using Place = typename Stages::Place;
  using Work = typename Stages::Work;
  using Tiles = QueryTiles<Stages::kRows>;
  using Scores = typename Softmax::Scores;
  using Values = float[kDim / 8][4];
  using Weights = uint32_t[Stages::kTileKeys / 16][4];
  static constexpr int kConsumers = Stages::kConsumers;
  static constexpr int kTileKeys = Stages::kTileKeys;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kSharedBytes = Stages::kSharedBytes;
  // Of a thread; together no more than the 64 Ki registers of a processor.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  static constexpr int kTurn = 1;  // named barrier kTurn + i: the turn of consumer i

  Stages stages;
  int lane = threadIdx.x % 32;
  // By a shuffle, so that the compiler knows that warps do not diverge on it: products in branches
  // that may diverge are waited for one by one.
  int group = __shfl_sync(Softmax::kAll, static_cast<int>(threadIdx.x) / kWarpgroup, 0);

  __device__ __forceinline__ void run(const WarpgroupParams& params) const {
    Work work;
    if (!Tiles::find(params.kernel, work.rows)) return;
    const KeyRange keys = Tiles::keys(params.kernel, work.rows);
    work.first = keys.begin / kTileKeys * kTileKeys;
    work.count = keys.end > work.first ? (keys.end - work.first + kTileKeys - 1) / kTileKeys : 0;
    const bool boxes = params.box_shift > 0;
    if (threadIdx.x == 0) stages.initialise(boxes ? 1 : kWarpgroup);
    // Nobody waits at a barrier, or copies for one, that is not initialised.
    KV_OMITTABLE(wgmma_init_barrier, __syncthreads());
    if (group == kConsumers) {
      give_up_registers<kProducerRegisters>();
      if (!boxes)
        KeyGatherer<kDim>{stages, params.kernel}.copy(work);
      else if (threadIdx.x / 32 == kConsumers * kWarpgroup / 32)
        BoxCopier<kDim>{stages, params}.copy(work);
    } else {
      take_registers<kConsumerRegisters>();
      consume(params.kernel, work);
    }
  }

  __device__ __forceinline__ void consume(const KernelParams& params, const Work& work) const {
    const int32_t first_row = work.rows.first + group * kGroupRows;
    stage_queries(params, work.rows, first_row);
    Softmax softmax;
    softmax.start(params, work.rows, first_row + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4);
    Values values;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] = 0.0f;
    if (work.count > 0) walk(params, work, softmax, values);
    softmax.finish();
    write(params, work.rows, softmax, values);
  }

  __device__ __forceinline__ void walk(const KernelParams& params, const Work& work,
                                       Softmax& softmax, Values& values) const {
    Scores scores;
    Weights weights;
    float factors[2];
    typename Softmax::Tile keys;
    if (group == kConsumers - 1) pass_turn();
    wait_full(Side::kKeys, 0);
    take_turn();
    warpgroup_fence(scores);
    multiply_queries(0, scores);
    if (work.count > 1 || group < kConsumers - 1) pass_turn();
    // The scores are complete.
    KV_OMITTABLE(wgmma_scores_wait, warpgroup_wait<0>(scores));
    load_presence(work, 0, keys);
    release(Side::kKeys, 0);
    softmax.weigh(params, work.rows, keys, lane, scores, factors);
    pack_weights(scores, weights);
#pragma unroll 1
    for (int32_t i = 1; i < work.count; ++i) {
      wait_full(Side::kKeys, i);
      wait_full(Side::kValues, i - 1);
      take_turn();
      warpgroup_fence(scores, values, weights);
      multiply_queries(i, scores);
      add_values(i - 1, weights, values);
      if (i + 1 < work.count || group < kConsumers - 1) pass_turn();
      // The scores are complete; the values may not be.
      KV_OMITTABLE(wgmma_scores_wait, warpgroup_wait<1>(scores));
      load_presence(work, i, keys);
      release(Side::kKeys, i);
      softmax.weigh(params, work.rows, keys, lane, scores, factors);
      // The values are complete, and the weights of tile i - 1 are free.
      KV_OMITTABLE(wgmma_values_wait, warpgroup_wait<0>(values, weights));
      release(Side::kValues, i - 1);
      rescale(factors, values);
      pack_weights(scores, weights);
    }
    wait_full(Side::kValues, work.count - 1);
    warpgroup_fence(values, weights);
    add_values(work.count - 1, weights, values);
    // The values are complete.
    KV_OMITTABLE(wgmma_end_wait, warpgroup_wait<0>(values, weights));
  }

  // The rows of this warpgroup, in the swizzle of boxes; rows that are not there are zeros. The
  // first take_turn is the barrier between this and products.
  __device__ __forceinline__ void stage_queries(const KernelParams& params, const WarpRows& rows,
                                                int32_t first) const {
    const AttentionParams& p = params.attention;
    constexpr int kChunks = kDim / 8;  // of 16 bytes
    for (int i = threadIdx.x % kWarpgroup; i < kGroupRows * kChunks; i += kWarpgroup) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint4 words = {0, 0, 0, 0};
      if (first + row < rows.end && chunk * 8 < p.head_dim) {
        const QueryRow query = query_row(params, rows.sequence, rows.kv_head, first + row);
        words = *reinterpret_cast<const uint4*>(
            static_cast<const T*>(p.q) + (rows.sequence.q_begin + query.token) * p.q_stride_token +
            query.head * p.q_stride_head + chunk * 8);
      }
      *reinterpret_cast<uint4*>(stages.queries(group) + Queries::offset(row, chunk)) = words;
    }
    async_proxy_fence();
  }

  __device__ __forceinline__ void load_presence(const Work& work, int32_t i,
                                                typename Softmax::Tile& keys) const {
    keys.begin = work.first + i * kTileKeys;
#pragma unroll
    for (int word = 0; word < kTileKeys / 32; ++word)
      keys.present[word] = stages.control().present[Place(i).stage][word];
  }

  // Consumers issue products in a circle. Nobody passes a turn that nobody takes.
  __device__ __forceinline__ void take_turn() const {
    // The other warpgroup has passed; all threads of this one are here, and have staged queries.
    KV_OMITTABLE(wgmma_turn_barrier, named_barrier_sync(kTurn + group, 2 * kWarpgroup));
  }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kTurn + (group + 1) % kConsumers, 2 * kWarpgroup);
  }

  __device__ __forceinline__ void wait_full(Side side, int32_t i) const {
    const Place place(i);
    // The producer's copies have landed.
    KV_OMITTABLE(wgmma_full_wait, barrier_wait(stages.full(side, place), place.parity));
  }

  // After products of tile i have been waited for.
  __device__ __forceinline__ void release(Side side, int32_t i) const {
    // All lanes are done with the stage when lane 0 says that the warp is.
    KV_OMITTABLE(wgmma_release_barrier, __syncwarp());
    if (lane == 0) barrier_arrive(stages.empty(side, Place(i)));
  }

  __device__ __forceinline__ void multiply_queries(int32_t i, Scores& scores) const {
    const uint64_t q = Queries::sum_columns(stages.queries(group));
    const uint64_t k = Keys::sum_columns(stages.tile(Side::kKeys, Place(i)));
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      multiply_shared<T>(scores, q + Queries::column_step(step), k + Keys::column_step(step),
                         step > 0);
    warpgroup_commit();
  }

  __device__ __forceinline__ void add_values(int32_t i, const Weights& weights,
                                             Values& values) const {
    const uint64_t v = Keys::sum_rows(stages.tile(Side::kValues, Place(i)));
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step)
      multiply_registers<T>(values, weights[step], v + Keys::row_step(step));
    warpgroup_commit();
  }

  __device__ __forceinline__ static void rescale(const float (&factors)[2], Values& values) {
    if (__all_sync(Softmax::kAll, factors[0] == 1.0f && factors[1] == 1.0f)) return;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] *= factors[i / 2];
  }

  // The layout of c in columns 16n to 16n + 15 is that of a.
  __device__ __forceinline__ static void pack_weights(const Scores& scores, Weights& weights) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[n][i] =
            pack<T>(scores[2 * n + i / 2][i % 2 * 2], scores[2 * n + i / 2][i % 2 * 2 + 1]);
  }

  __device__ __forceinline__ void write(const KernelParams& params, const WarpRows& rows,
                                        Softmax& softmax, const Values& values) const {
    const AttentionParams& p = params.attention;
    const float value_scale = head_scale(p.v_scale, rows.kv_head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (softmax.first_row + 8 * half >= rows.end) continue;
      const QueryRow query = softmax.query(params, rows, half);
      const int64_t place = output_place(p, rows.sequence, query);
      SoftmaxState& state = softmax.state[half];
      const float rescaled = p.sinks != nullptr ? state.add_sink(p.sinks[query.head]) : 1.0f;
      const float factor = state.normalizer() * rescaled * value_scale;
      T* out = static_cast<T*>(p.out) + place * p.v_head_dim;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        if (8 * j < p.v_head_dim)
          *reinterpret_cast<uint32_t*>(out + 8 * j + 2 * (lane % 4)) =
              pack<T>(values[j][2 * half] * factor, values[j][2 * half + 1] * factor);
      if (lane % 4 == 0) p.lse[place] = state.lse();
    }
  }
};

}  // namespace pykvcache::cuda
