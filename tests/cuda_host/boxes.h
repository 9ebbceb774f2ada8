// Boxes of the tensor memory accelerator: cp.async.bulk.tensor.4d in tile mode with 128-byte
// swizzle, after PTX ISA 9.0, "Tensors" and "Swizzling modes", and the driver API's description of
// cuTensorMapEncodeTiled. Read mbarrier.h first.
//
// A box may arrive at any time between its copy and the end of its barrier's phase. Late (the
// default of fibers) is when a thread waits for it, so that what does not wait reads what was there
// before; early (the default of OS threads) is at once, so that what overwrites a tile that others
// still read shows.
#pragma once

#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda_host/mbarrier.h"

namespace cuda_host {

// As large and aligned as the driver's of CUDA 13.
struct alignas(128) TensorMap {
  const unsigned char* data = nullptr;
  int64_t sizes[4] = {};         // elements of 2 bytes
  int64_t stride_bytes[4] = {};  // of each dimension
  int box[4] = {};
};

struct Box {
  TensorMap map;
  unsigned char* to;
  Barrier* barrier;
  int at[4];
};

inline bool& boxes_are_late() {
#ifdef KV_HOST_THREADS
  static bool late = false;
#else
  static bool late = true;
#endif
  return late;
}
inline std::vector<Box>& late_boxes() {
  static std::vector<Box> boxes;
  return boxes;
}
inline std::mutex& late_boxes_mutex() {
  static std::mutex mutex;
  return mutex;
}

// Swizzle of 16-byte chunks in spans of 16 << bits bytes: address bits 4 to 6 are exclusive-ored
// with bits 7 to 9.
inline uint32_t swizzled(uint32_t address, int bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

// Where the shared memory of a CTA begins for its own addresses: not at 0.
constexpr uint32_t kSharedBegin = 3 << 10;

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - current->shared;
  if (offset < 0 || static_cast<size_t>(offset) >= current->shared_bytes)
    stop("an address that is not in shared memory");
  return static_cast<uint32_t>(offset) + kSharedBegin;
}
inline unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  if (address < kSharedBegin || address - kSharedBegin + bytes > current->shared_bytes)
    stop("a copy or product leaves the shared memory of its CTA");
  return current->shared + (address - kSharedBegin);
}

// Zeros where a coordinate is outside, on either side.
inline uint16_t element_of(const Box& box, const int (&at)[4]) {
  int64_t offset = 0;
  for (int d = 0; d < 4; ++d) {
    if (at[d] < 0 || at[d] >= box.map.sizes[d]) return 0;
    offset += at[d] * box.map.stride_bytes[d];
  }
  uint16_t value;
  std::memcpy(&value, box.map.data + offset, 2);
  return value;
}

inline void land(const Box& box) {
  uint32_t to = shared_address(box.to);
  if (to % 128 != 0) stop("TMA: a box must begin at a multiple of 128 bytes");
  int at[4], bytes = 0;
  for (at[3] = box.at[3]; at[3] < box.at[3] + box.map.box[3]; ++at[3])
    for (at[2] = box.at[2]; at[2] < box.at[2] + box.map.box[2]; ++at[2])
      for (at[1] = box.at[1]; at[1] < box.at[1] + box.map.box[1]; ++at[1])
        for (at[0] = box.at[0]; at[0] < box.at[0] + box.map.box[0]; ++at[0]) {
          const uint16_t value = element_of(box, at);
          std::memcpy(shared_pointer(swizzled(to, 3), 2), &value, 2);
          to += 2;
          bytes += 2;
        }
  change_barrier(box.barrier, 0, -bytes);
}

inline void copy_box(const Box& box) {
  if (!boxes_are_late()) return land(box);
  const std::lock_guard lock(late_boxes_mutex());
  late_boxes().push_back(box);
}

// What a barrier's phase waits for arrives.
inline void land_boxes_of(Barrier* barrier) {
  const std::lock_guard lock(late_boxes_mutex());
  auto& boxes = late_boxes();
  for (size_t i = 0; i < boxes.size();) {
    if (boxes[i].barrier != barrier) {
      ++i;
      continue;
    }
    land(boxes[i]);
    boxes.erase(boxes.begin() + i);
  }
}

inline void wait_for_phase(Barrier* barrier, uint32_t parity) {
  while (!phase_ended(barrier, parity)) {
    if (boxes_are_late()) land_boxes_of(barrier);
    if (!phase_ended(barrier, parity)) yield();
  }
}

// What the driver checks when it encodes a map.
inline void check_map(const TensorMap& map) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("tensor map: ") + what);
  };
  require(reinterpret_cast<uintptr_t>(map.data) % 16 == 0, "the address must be a multiple of 16");
  require(map.box[0] * 2 % 16 == 0 && map.box[0] * 2 <= 128, "rows of a box must fit the swizzle");
  for (int d = 0; d < 4; ++d) {
    require(map.sizes[d] >= 1 && map.sizes[d] <= int64_t{1} << 32, "sizes must be 1 to 2^32");
    require(map.box[d] >= 1 && map.box[d] <= 256, "a box must be 1 to 256 elements");
    if (d == 0) continue;
    require(map.stride_bytes[d] % 16 == 0, "strides must be multiples of 16 bytes");
    require(map.stride_bytes[d] >= 0 && map.stride_bytes[d] < int64_t{1} << 40,
            "strides must be below 2^40 bytes");
  }
}

}  // namespace cuda_host
