// Times the allocator's operations inside C++, for benchmarks/allocator.py.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pykvcache {

// Nanoseconds of each repetition, by operation; the unit of work is in the name.
using Timings = std::vector<std::pair<std::string, std::vector<double>>>;

// The pool is worn: sequences of 1 to 8,192 tokens filled it and a random half was freed again.
Timings time_allocator(int64_t num_blocks, int64_t repeats);

// The whole pool is cached: such sequences recorded random tokens, and ended in random order.
Timings time_prefixes(int64_t num_blocks, int64_t repeats);

// Nanoseconds of one call, divided by the units of work in it.
template <class F>
double time_per(int64_t units, F&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / static_cast<double>(units);
}

}  // namespace pykvcache
