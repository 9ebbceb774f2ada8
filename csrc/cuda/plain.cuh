// Attention without tensor cores, for whatever the others do not take: float32, head dims up to
// 576, rows that are not aligned to 16 bytes, scales of channels. One CTA for each query row; warp
// w takes tiles w, w + 4, ... of 32 keys, one key a lane for the scores and all lanes for a value.
#pragma once

#include "cuda/logits.cuh"

namespace pykvcache::cuda {

template <class KV>
struct Plain {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLaneDims = (kMaxPlainDim + 31) / 32;  // dims lane + 32 i of a value
  static constexpr unsigned kAll = 0xffffffffu;

  // One warp's tile: what each key weighs and where its value lies.
  struct Weights {
    float weight[32];
    BlockSlot place[32];
  };

  // Shared memory: q [D], then values [Dv], state and tile of every warp.
  static constexpr int kSharedBytes =
      (kMaxPlainDim + kWarps * kMaxPlainDim) * 4 +
      kWarps * static_cast<int>(sizeof(SoftmaxState) + sizeof(Weights));

  float* query = reinterpret_cast<float*>(dynamic_shared());
  float* piece_values = query + kMaxPlainDim;
  SoftmaxState* piece_states =
      reinterpret_cast<SoftmaxState*>(piece_values + kWarps * kMaxPlainDim);
  Weights* tiles = reinterpret_cast<Weights*>(piece_states + kWarps);
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;

  __device__ __forceinline__ static float load_query(const AttentionParams& p, int64_t at) {
    switch (p.q_dtype) {
      case DType::kFloat16:
        return to_float(static_cast<const Half*>(p.q)[at]);
      case DType::kBFloat16:
        return to_float(static_cast<const BFloat16*>(p.q)[at]);
      default:
        return static_cast<const float*>(p.q)[at];
    }
  }

  __device__ __forceinline__ static void store_out(const AttentionParams& p, int64_t at, float x) {
    switch (p.q_dtype) {
      case DType::kFloat16:
        static_cast<Half*>(p.out)[at] = from_float<Half>(x);
        break;
      case DType::kBFloat16:
        static_cast<BFloat16*>(p.out)[at] = from_float<BFloat16>(x);
        break;
      default:
        static_cast<float*>(p.out)[at] = x;
    }
  }

  // The row of a key: nullptr if it is not there.
  __device__ __forceinline__ static const KV* row_of(const CacheView& cache, const BlockSlot& place,
                                                     int32_t kv_head) {
    if (place.block < 0) return nullptr;
    return static_cast<const KV*>(cache.data) +
           cache_offset(cache, place.block, kv_head, place.slot);
  }

  // Scale of element d of a row beyond the head's: one a slot, one a channel, or 1.
  __device__ __forceinline__ static float row_scale(const ScaleView& scale, const BlockSlot& place,
                                                    int32_t kv_head, int64_t d) {
    if (scale.kind == ScaleKind::kSlot)
      return block_scales(scale, place.block, kv_head)[place.slot];
    if (scale.kind == ScaleKind::kChannel) return block_scales(scale, place.block, kv_head)[d];
    return 1.0f;
  }

  // Four sums: one alone would wait for itself, and round more.
  __device__ __forceinline__ float dot(const AttentionParams& p, const BlockSlot& place,
                                       int32_t kv_head) const {
    const KV* key = row_of(p.k, place, kv_head);
    const bool channels = p.k_scale.kind == ScaleKind::kChannel;
    float sums[4] = {};
    for (int64_t d = 0; d < p.head_dim; d += 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (d + i >= p.head_dim) break;
        const float x = to_float(key[d + i]);
        sums[i] += query[d + i] * (channels ? x * row_scale(p.k_scale, place, kv_head, d + i) : x);
      }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return channels ? sum : sum * row_scale(p.k_scale, place, kv_head, 0);
  }

  // Keys of this warp's tiles within `keys`, into a state and values of this lane's dims.
  __device__ __forceinline__ SoftmaxState attend(const KernelParams& params,
                                                 const Sequence& sequence, const QueryRow& row,
                                                 int32_t kv_head, const KeyRange& keys,
                                                 float (&values)[kLaneDims]) const {
    const AttentionParams& p = params.attention;
    const float scale = p.scale * head_scale(p.k_scale, kv_head);
    SoftmaxState state;
    for (int32_t tile = keys.begin / 32; tile * 32 < keys.end; ++tile) {
      if (tile % kWarps != warp) continue;
      const int32_t key = tile * 32 + lane;
      BlockSlot place{-1, 0};
      if (key >= keys.begin && key < keys.end) place = sequence.locate(params.block_size, key);
      float logit = kNothing;
      if (place.block >= 0)
        logit = modified_logit(p, sequence, row, key, dot(p, place, kv_head) * scale);
      float top = logit;
      for (int flip = 16; flip > 0; flip /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, flip));
      const float factor = state.raise(top);
      const float weight = exp2_fast(logit - state.base());
      state.sum += weight;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) values[i] *= factor;
      tiles[warp].weight[lane] = weight;
      tiles[warp].place[lane] = place;
      // Every lane's key is written before any lane reads it.
      KV_OMITTABLE(plain_key_barrier, __syncwarp());
      for (int other = 0; other < 32; ++other) {
        const float own = tiles[warp].weight[other];
        if (own != 0.0f) add_value(p, tiles[warp].place[other], kv_head, own, values);
      }
      // All have read the tile before the next one overwrites it.
      KV_OMITTABLE(plain_tile_barrier, __syncwarp());
    }
    for (int flip = 16; flip > 0; flip /= 2) state.sum += __shfl_xor_sync(kAll, state.sum, flip);
    return state;
  }

  __device__ __forceinline__ void add_value(const AttentionParams& p, const BlockSlot& place,
                                            int32_t kv_head, float weight,
                                            float (&values)[kLaneDims]) const {
    const KV* value = row_of(p.v, place, kv_head);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = lane + 32 * i;
      if (d < p.v_head_dim)
        values[i] += weight * (to_float(value[d]) * row_scale(p.v_scale, place, kv_head, d));
    }
  }

  // grid (T, HQ)
  __device__ __forceinline__ void run(const KernelParams& params) const {
    const AttentionParams& p = params.attention;
    const auto token = static_cast<int32_t>(blockIdx.x);
    const auto head = static_cast<int32_t>(blockIdx.y);
    const int32_t kv_head = params.group.quotient(head);
    const int32_t batch_row = find_row(p.cu_seqlens_q, static_cast<int32_t>(p.batch), token);
    if (batch_row >= p.batch) return;
    const Sequence sequence = load_sequence(p, batch_row);
    QueryRow row{token - sequence.q_begin, head, 0};
    row.position = sequence.kv_len - sequence.q_len + row.token;
    for (int64_t d = threadIdx.x; d < p.head_dim; d += kThreads)
      query[d] = load_query(p, token * p.q_stride_token + head * p.q_stride_head + d);
    // q is written by all threads before any reads it.
    KV_OMITTABLE(plain_query_barrier, __syncthreads());

    float values[kLaneDims] = {};
    const KeyRange keys = visible_keys(p, sequence, row.position);
    const SoftmaxState state = attend(params, sequence, row, kv_head, keys, values);
    if (lane == 0) piece_states[warp] = state;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i)
      piece_values[warp * kMaxPlainDim + lane + 32 * i] = values[i];
    // Every warp's part is written before any is read.
    KV_OMITTABLE(plain_state_barrier, __syncthreads());
    write(params, output_place(p, sequence, row), head, head_scale(p.v_scale, kv_head));
  }

  __device__ __forceinline__ void write(const KernelParams& params, int64_t place, int32_t head,
                                        float value_scale) const {
    const AttentionParams& p = params.attention;
    SoftmaxState total;
    for (int w = 0; w < kWarps; ++w) total.raise(piece_states[w].highest);
    float weights[kWarps];
    for (int w = 0; w < kWarps; ++w) {
      weights[w] = total.weight(piece_states[w]);
      total.sum += piece_states[w].sum * weights[w];
    }
    const float rescale = p.sinks != nullptr ? total.add_sink(p.sinks[head]) : 1.0f;
    const float factor = total.normalizer() * rescale * value_scale;
    for (int64_t d = threadIdx.x; d < p.v_head_dim; d += kThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += weights[w] * piece_values[w * kMaxPlainDim + d];
      store_out(p, place * p.v_head_dim + d, sum * factor);
    }
    if (threadIdx.x == 0) p.lse[place] = total.lse();
  }
};

}  // namespace pykvcache::cuda
