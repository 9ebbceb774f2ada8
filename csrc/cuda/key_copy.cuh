// From the block pool to shared memory: a warp copies 16 keys at a time, K and V, asynchronously.
//
// A row is copied by kChunks lanes, a segment of the warp. The segment finds the addresses of the
// keys that it copies, K's in its lower half, V's in its upper one, and its lanes get them one by
// one by a shuffle: no address is computed twice, and a copy costs few instructions beside it.
// Block ids are fetched one call ahead (next_): the copies would wait for them otherwise. Rows of
// keys that are not there, and dims past the head's, are zeros: whatever the pool holds, 0 * NaN
// never enters a sum.
#pragma once

#include "cuda/shared_tile.cuh"
#include "cuda/warp_attention.cuh"

namespace pykvcache::cuda {

constexpr int kGroupKeys = 16;

// Shared memory of `kKeys` keys. Scales and presence follow the rows.
template <class KV, int kDim, int kKeys>
struct KeyStage {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(KV));
  static constexpr int kSideBytes = kKeys * kRowBytes;
  static constexpr int kRowsBytes = 2 * kSideBytes;
  static constexpr int kGroups = kKeys / kGroupKeys;

  struct Extras {
    float scales[2][kKeys];     // of K and V, if one a slot
    uint32_t present[kGroups];  // bit per key
  };

  unsigned char* rows;
  Extras* extras;

  __device__ __forceinline__ KeyTile tile(int32_t begin, int group, int groups) const {
    const int key = group * kGroupKeys;
    uint32_t present = extras->present[group];
    for (int i = 1; i < groups; ++i) present |= extras->present[group + i] << (i * kGroupKeys);
    return {rows + key * kRowBytes,
            rows + kSideBytes + key * kRowBytes,
            extras->scales[0] + key,
            extras->scales[1] + key,
            begin,
            present};
  }
};

template <class KV, int kDim>
class KeyCopier {
 public:
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(KV));
  static constexpr int kChunks = kRowBytes / kChunk;  // of a row, a power of two
  static constexpr int kRowsAtOnce = 32 / kChunks;    // one by each segment
  static constexpr int kTurns = kGroupKeys / kRowsAtOnce;
  static_assert(kRowsAtOnce >= 1 && 2 * kTurns == kChunks);
  static constexpr unsigned kAll = 0xffffffffu;

  __device__ __forceinline__ KeyCopier(const KernelParams& params, int lane)
      : params_(params), lane_(lane) {}

  // Begins at position `first` of a sequence; later calls of copy() take `step` keys more each.
  __device__ __forceinline__ void start(const Sequence& sequence, int32_t kv_head, int32_t first,
                                        int32_t step) {
    sequence_ = sequence;
    kv_head_ = kv_head;
    position_ = first + key();
    step_ = step;
    next_ = sequence_.locate(params_.block_size, position_);
  }

  // Issues the copies of the next 16 keys into rows [16 group, 16 group + 16) of a stage.
  template <class Stage>
  __device__ __forceinline__ void copy(const Stage& stage, int group) {
    const AttentionParams& p = params_.attention;
    const BlockSlot place = next_;
    position_ += step_;
    next_ = sequence_.locate(params_.block_size, position_);
    const bool there = place.block >= 0;
    const uint32_t present = __reduce_or_sync(kAll, there ? 1u << key() : 0u);
    if (lane_ == 0) stage.extras->present[group] = present;
    // Bit i: whether the key of turn i is there.
    const uint32_t turns = __ballot_sync(kAll, there) >> segment() * kChunks;
    const CacheView& own = side() == 0 ? p.k : p.v;
    const int64_t offset = there ? cache_offset(own, place.block, kv_head_, place.slot) : 0;
    const auto row = reinterpret_cast<uint64_t>(static_cast<const KV*>(own.data) + offset);
    const int first_row = group * kGroupKeys;
    copy_side(row, stage.rows, turns, 0, first_row, p.head_dim);
    copy_side(row, stage.rows + Stage::kSideBytes, turns, kTurns, first_row, p.v_head_dim);
    copy_scales(stage, place, first_row);
  }

 private:
  __device__ __forceinline__ int segment() const { return lane_ / kChunks; }
  __device__ __forceinline__ int chunk() const {
    return lane_ % kChunks;
  }  // that it copies of rows
  // Whose address this lane finds: of K (0) or V (1), key of the 16.
  __device__ __forceinline__ int side() const { return chunk() / kTurns; }
  __device__ __forceinline__ int key() const { return chunk() % kTurns * kRowsAtOnce + segment(); }

  // own_row: where the row of this lane's key begins, or any row if that is not there.
  // owners: lane of the segment that has the row of the first turn.
  __device__ __forceinline__ void copy_side(uint64_t own_row, unsigned char* rows, uint32_t turns,
                                            int owners, int first_row, int64_t dim) const {
    const bool used = chunk() * kChunk < dim * static_cast<int>(sizeof(KV));
    const uint32_t real = used ? turns : 0;
    const int part = used ? chunk() * kChunk : 0;
    const int place = chunk_offset<kRowBytes>(segment(), chunk());
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const uint64_t from = __shfl_sync(kAll, own_row, owners + i, kChunks) + part;
      const int row = i * kRowsAtOnce;  // segment() has none of its bits
      copy_async_16(rows + (first_row + row) * kRowBytes + (place ^ chunk_flip<kRowBytes>(row)),
                    reinterpret_cast<const void*>(from), real & 1u << i);
    }
  }

  template <class Stage>
  __device__ __forceinline__ void copy_scales(const Stage& stage, const BlockSlot& place,
                                              int first_row) const {
    const AttentionParams& p = params_.attention;
    const ScaleView& scale = side() == 0 ? p.k_scale : p.v_scale;
    if (scale.kind != ScaleKind::kSlot) return;
    const bool real = place.block >= 0;
    const float* source =
        real ? block_scales(scale, place.block, kv_head_) + place.slot : scale.data;
    copy_async_4(&stage.extras->scales[side()][first_row + key()], source, real);
  }

  const KernelParams& params_;
  Sequence sequence_;
  BlockSlot next_;
  int32_t kv_head_;
  int32_t position_;
  int32_t step_;
  int lane_;
};

// 16 dims of a row of bfloat16 become halves in a unit of the row, which is returned. The other
// dims are with the other lanes of a segment of kLanes; all lanes of a warp take part.
template <int kLanes>
__device__ __forceinline__ float to_halves(uint32_t (&words)[8]) {
  constexpr unsigned kAll = 0xffffffffu;
  float numbers[8][2];
  float largest = 0.0f;
#pragma unroll
  for (int w = 0; w < 8; ++w)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      numbers[w][half] = to_float(BFloat16{static_cast<uint16_t>(words[w] >> (16 * half))});
      largest = fmaxf(largest, fabsf(numbers[w][half]));
    }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, lanes));
  const float unit = unit_of<14>(largest);
  const float inverse = inverse_of(unit);
#pragma unroll
  for (int w = 0; w < 8; ++w)
    words[w] = pack<Half>(numbers[w][0] * inverse, numbers[w][1] * inverse);
  return unit;
}

// Query rows [first, first + count) of a sequence into shared memory, by all threads of the CTA;
// rows that are not there are zeros. Float8: as halves, with their units [count]. Visible to others
// after the caller's barrier. `count` rows are whole warps' work.
template <class T, class KV, int kDim>
__device__ __forceinline__ void stage_queries(const KernelParams& params, const WarpRows& rows,
                                              int count, unsigned char* to, float* units) {
  using Tile = SharedTile<T, KV, kDim>;
  const AttentionParams& p = params.attention;
  constexpr int kParts = kDim / 16;
  for (int i = threadIdx.x; i < count * kParts; i += blockDim.x) {
    const int row = i / kParts, part = i % kParts;  // 16 dims, 2 chunks
    alignas(16) uint32_t words[8] = {};
    if (rows.first + row < rows.end) {
      const QueryRow query = query_row(params, rows.sequence, rows.kv_head, rows.first + row);
      const T* from = static_cast<const T*>(p.q) +
                      (rows.sequence.q_begin + query.token) * p.q_stride_token +
                      query.head * p.q_stride_head + part * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (part * 16 + half * 8 >= p.head_dim) continue;
        const uint4 loaded = *reinterpret_cast<const uint4*>(from + half * 8);
        const uint32_t read[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) words[Tile::swizzled_word(half * 4 + w)] = read[w];
      }
    }
    if constexpr (Tile::kFloat8) {
      const float unit = p.q_dtype == DType::kBFloat16 ? to_halves<kParts>(words) : 1.0f;
      if (part == 0) units[row] = unit;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint4*>(to + chunk_offset<Tile::kQueryBytes>(row, 2 * part + half)) = {
          words[half * 4], words[half * 4 + 1], words[half * 4 + 2], words[half * 4 + 3]};
  }
}

}  // namespace pykvcache::cuda
