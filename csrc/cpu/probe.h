// Measures of the memory itself, to compare kernels with.
#pragma once

#include <cstdint>
#include <span>

namespace pykvcache {

// Reads regions of `bytes` each on torch's threads, every thread a run of them in the given order.
// Returns their sum as floats, which keeps the loads alive.
float read_regions(std::span<const int64_t> addresses, int64_t bytes);

}  // namespace pykvcache
