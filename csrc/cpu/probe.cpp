#include "cpu/probe.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"

namespace pykvcache {

float read_regions(std::span<const int64_t> addresses, int64_t bytes) {
  const auto count = static_cast<int64_t>(addresses.size());
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t run = std::max<int64_t>(1, (count + threads - 1) / threads);
  std::atomic<float> total{0.0f};
  torch::stable::parallel_for(0, count, run, [&](int64_t begin, int64_t end) {
    float sum = 0.0f;
    for (int64_t i = begin; i < end; ++i)
      sum += kernels().read(reinterpret_cast<const float*>(addresses[i]),
                            bytes / static_cast<int64_t>(sizeof(float)));
    total.fetch_add(sum);
  });
  return total;
}

}  // namespace pykvcache
