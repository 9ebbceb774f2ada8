// What the launchers know of the kernels: one table of functions per instruction set, chosen at run
// time. Each kernels/*.cpp is compiled once per set and defines its functions in the namespace of
// that set. Read next: kernels/decode.cpp and kernels/prefill.cpp.
#pragma once

#include <cstdint>

#include "params.h"

namespace pykvcache {

// Softmax of some keys: the highest score, in base 2, and the sum of 2^(score - highest). Not their
// log-sum-exp: beside a bias of -1e9 it has no room for the sum.
struct PartialState {
  float highest;
  float sum;
};

// A piece of one batch row's attention: some of its queries and KV heads against some of its keys.
struct AttentionItem {
  int64_t row = 0;
  int64_t head_begin = 0;  // KV heads
  int64_t head_end = 0;
  int64_t q_begin = 0;  // queries of the row
  int64_t q_end = 0;
  int64_t kv_begin = 0;  // positions, already clipped to what these queries see
  int64_t kv_end = 0;
  // nullptr: the item covers all keys and writes params.out and params.lse. Otherwise it writes its
  // places in one split of the row, without sinks and not normalised: fp32 [q_len, HQ, Dv] and
  // [q_len, HQ].
  float* partial_out = nullptr;
  PartialState* partial_states = nullptr;
};

// Tokens of a decode tile, and the steps that prefetching runs ahead; 0 stages: two streams that
// the processor's own prefetchers follow.
struct DecodeShape {
  int64_t tile;
  int64_t stages;
};

// A linear layer in bfloat16, everything contiguous: x [rows, inputs], weight [outputs, inputs],
// bias [outputs] or nullptr, out [rows, outputs].
struct LinearParams {
  const void* x;
  const void* weight;
  const void* bias;
  void* out;
  int64_t rows;
  int64_t inputs;  // a multiple of kLinearInputs
  int64_t outputs;
};
constexpr int64_t kLinearInputs = 32;
constexpr int64_t kLinearPanelBytes = 128;  // of `panel`, an input

struct KernelTable {
  // Few query rows per KV head (q_len * G <= kMaxDecodeRows), no bias; K, V and q of one dtype and
  // no scales, or float8 caches with any scales but those of channels. Streams all heads of the
  // item block by block.
  void (*decode)(const AttentionParams&, const AttentionItem&, void* scratch);
  int64_t (*decode_scratch_bytes)(const AttentionParams&);
  DecodeShape (*decode_shape)(const AttentionParams&);  // that decode runs with
  // Any item of one KV head.
  void (*prefill)(const AttentionParams&, const AttentionItem&, void* scratch);
  int64_t (*prefill_scratch_bytes)(const AttentionParams&);
  int64_t (*prefill_query_tile)(const AttentionParams&);  // q_end - q_begin at most
  // Combines the splits [num_splits, q_len, HQ, Dv] and [num_splits, q_len, HQ] of an item that was
  // cut along its keys, and the sinks, into params.out and params.lse.
  void (*merge_splits)(const AttentionParams&, const AttentionItem&, const float* partial_out,
                       const PartialState* partial_states, int64_t num_splits);
  float (*read)(const float*, int64_t count);  // the sum
  // The largest |x| of a row; NaN does not count.
  float (*largest)(const void* from, DType, int64_t n);
  // A row divided by `scale`, or by `channels` [n] if these are given.
  void (*to_float8)(const void* from, DType, int64_t n, float scale, const float* channels,
                    uint8_t* to);
  // Linear layers: most rows (0: not with this instruction set); x into `panel`; then outputs
  // [begin, end), where begin is a multiple of 16.
  int64_t (*linear_rows)();
  void (*linear_pack)(const LinearParams&, float* panel);
  void (*linear_outputs)(const LinearParams&, const float* panel, int64_t begin, int64_t end);
};

constexpr int64_t kMaxDecodeRows = 24;
const KernelTable& kernels();

#define KV_DECLARE_KERNELS(isa)                                                 \
  namespace isa {                                                               \
  void decode(const AttentionParams&, const AttentionItem&, void*);             \
  int64_t decode_scratch_bytes(const AttentionParams&);                         \
  DecodeShape decode_shape(const AttentionParams&);                             \
  void prefill(const AttentionParams&, const AttentionItem&, void*);            \
  int64_t prefill_scratch_bytes(const AttentionParams&);                        \
  int64_t prefill_query_tile(const AttentionParams&);                           \
  void merge_splits(const AttentionParams&, const AttentionItem&, const float*, \
                    const PartialState*, int64_t);                              \
  float read(const float*, int64_t);                                            \
  float largest(const void*, DType, int64_t);                                   \
  void to_float8(const void*, DType, int64_t, float, const float*, uint8_t*);   \
  int64_t linear_rows();                                                        \
  void linear_pack(const LinearParams&, float*);                                \
  void linear_outputs(const LinearParams&, const float*, int64_t, int64_t);     \
  }

KV_DECLARE_KERNELS(portable)
#ifdef KV_X86
KV_DECLARE_KERNELS(avx2)
KV_DECLARE_KERNELS(avx512)
KV_DECLARE_KERNELS(avx512bf16)
#endif

}  // namespace pykvcache
