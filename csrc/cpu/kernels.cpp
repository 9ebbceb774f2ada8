#include "cpu/kernels.h"

#include "cpu/isa.h"

#define KV_TABLE(isa)          \
  {isa::decode,                \
   isa::decode_scratch_bytes,  \
   isa::decode_shape,          \
   isa::prefill,               \
   isa::prefill_scratch_bytes, \
   isa::prefill_query_tile,    \
   isa::merge_splits,          \
   isa::read,                  \
   isa::largest,               \
   isa::to_float8,             \
   isa::linear_rows,           \
   isa::linear_pack,           \
   isa::linear_outputs}

namespace pykvcache {

const KernelTable& kernels() {
  static const KernelTable tables[] = {
      KV_TABLE(portable),
#ifdef KV_X86
      KV_TABLE(avx2),
      KV_TABLE(avx512),
      KV_TABLE(avx512bf16),
#endif
  };
  static const KernelTable& chosen = tables[static_cast<int>(cpu_isa())];
  return chosen;
}

}  // namespace pykvcache
