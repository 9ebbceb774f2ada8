// Division by a number that the host knows: a multiplication and a shift (Granlund and Montgomery,
// 1994). Exact for 0 <= n < 2^31.
#pragma once

#include <cstdint>

#ifdef KV_CUDA_HOST
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace pykvcache::cuda {

struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  int32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    if (divisor == 1) return;
    int bits = 0;  // ceil(log2(divisor))
    while ((int64_t{1} << bits) < d) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    multiplier = static_cast<uint32_t>((power + divisor - 1) / divisor);
    shift = bits - 1;
  }

  __device__ __forceinline__ int32_t quotient(int32_t n) const {
    if (divisor == 1) return n;
    return static_cast<int32_t>(__umulhi(static_cast<uint32_t>(n), multiplier) >> shift);
  }
  __device__ __forceinline__ int32_t remainder(int32_t n) const {
    return n - quotient(n) * static_cast<int32_t>(divisor);
  }
};

}  // namespace pykvcache::cuda
