// Scratch memory of the launchers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pykvcache {

// Memory of one thread that lives as long as the thread and only grows.
class ThreadBuffer {
 public:
  ThreadBuffer() = default;
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  ~ThreadBuffer() { std::free(data_); }

  void* at_least(int64_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, static_cast<size_t>(size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace pykvcache
