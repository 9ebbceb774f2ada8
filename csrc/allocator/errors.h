// Exceptions of the block allocator. Each leaves the allocator as it was; binding.cpp turns them
// into the Python exceptions of pykvcache/errors.py. Bad arguments are std::invalid_argument
// (ValueError).
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace pykvcache {

struct AllocatorError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfBlocks : AllocatorError {
  OutOfBlocks(const std::string& message, int64_t needed, int64_t free, int64_t total)
      : AllocatorError(message), needed(needed), free(free), total(total) {}
  int64_t needed, free, total;
};

// A sequence freed twice, or a block unpinned more often than it was pinned.
struct DoubleFree : AllocatorError {
  using AllocatorError::AllocatorError;
};

// A handle that this allocator never gave out, or whose sequence is gone.
struct UnknownSequence : AllocatorError {
  using AllocatorError::AllocatorError;
};

// A block id outside the pool, or of a block that is free.
struct UnknownBlock : AllocatorError {
  using AllocatorError::AllocatorError;
};

// check_integrity() found references, free list and tables in disagreement.
struct IntegrityError : AllocatorError {
  using AllocatorError::AllocatorError;
};

// Bytes that are not a snapshot, or a damaged one.
struct SnapshotError : AllocatorError {
  using AllocatorError::AllocatorError;
};

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void bad_argument(const Parts&... parts) {
  throw std::invalid_argument(message(parts...));
}

}  // namespace pykvcache
