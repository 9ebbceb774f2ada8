// Times the allocator's operations inside C++, for benchmarks/allocator.py.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pykvcache {

// Nanoseconds of each repetition, by operation; the unit of work is in the name. The pool is worn:
// sequences of 1 to 8,192 tokens filled it and a random half of them was freed again.
std::vector<std::pair<std::string, std::vector<double>>> time_allocator(int64_t num_blocks,
                                                                        int64_t repeats);

}  // namespace pykvcache
