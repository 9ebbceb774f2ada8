// Plain loads of memory and nothing else: what a kernel that reads the same bytes could reach. No
// software prefetch; four independent sums, so that nothing waits for an addition.
#include "cpu/kernels.h"
#include "cpu/kernels/vec.h"

namespace pykvcache::KV_ISA {

float read(const float* data, int64_t count) {
  constexpr int kSums = 4;
  Vec a = zero(), b = zero(), c = zero(), d = zero();
  for (int64_t i = 0; i + kSums * kWidth <= count; i += kSums * kWidth) {
    a = a + load(data + i);
    b = b + load(data + i + kWidth);
    c = c + load(data + i + 2 * kWidth);
    d = d + load(data + i + 3 * kWidth);
  }
  return reduce_add((a + b) + (c + d));
}

}  // namespace pykvcache::KV_ISA
