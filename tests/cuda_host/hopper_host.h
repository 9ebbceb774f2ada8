// The named instructions of csrc/cuda/hopper.cuh as host C++. Models: mbarrier.h, boxes.h,
// warpgroup.h. async_proxy_fence and warpgroup_fence are nothing here: their absence, and what the
// hardware makes of a descriptor or tensor map beyond its documentation, only a GPU shows.
#pragma once

#include "cuda_host/ptx_host.h"
#include "cuda_host/warpgroup.h"

namespace pykvcache::cuda {

using TensorMap = ::cuda_host::TensorMap;
using Barrier = ::cuda_host::Barrier;
using ::cuda_host::shared_address;

inline void barrier_init(Barrier* barrier, int arrivals) {
  *barrier = ::cuda_host::BarrierState{arrivals, arrivals, 0, false}.pack();
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier) { ::cuda_host::change_barrier(barrier, 1, 0); }
inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  ::cuda_host::change_barrier(barrier, 1, bytes);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  ::cuda_host::wait_for_phase(barrier, parity);
}
inline void named_barrier_sync(int id, int threads) { ::cuda_host::sync_at_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { ::cuda_host::arrive_at_named(id, threads); }
inline void async_proxy_fence() {}

inline void prefetch_map(const TensorMap*) {}
inline void copy_box(void* to, const TensorMap* map, Barrier* barrier, int32_t dim, int32_t slot,
                     int32_t head, int32_t block) {
  ::cuda_host::copy_box({*map, static_cast<unsigned char*>(to), barrier, {dim, slot, head, block}});
}

inline TensorMap encode_map(const BoxLayout& layout) {
  TensorMap map;
  map.data = static_cast<const unsigned char*>(layout.data);
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = layout.sizes[d];
    map.stride_bytes[d] = d == 0 ? 2 : layout.stride_bytes[d - 1];
    map.box[d] = 1;
  }
  map.box[0] = kBoxColumns;
  map.box[1] = layout.box_rows;
  ::cuda_host::check_map(map);
  return map;
}

template <int kRegisters>
void give_up_registers() {}
template <int kRegisters>
void take_registers() {}

template <class... Registers>
void warpgroup_fence(Registers&...) {}
inline void warpgroup_commit() { ::cuda_host::commit_products(); }
template <int kPending, class... Registers>
void warpgroup_wait(Registers&...) {
  ::cuda_host::finish_products(kPending);
}

template <class T>
float float_of_bits(uint16_t bits) {
  return to_float(T{bits});
}

template <class T, int kCount>
void multiply_shared(float (&c)[kCount][4], uint64_t a, uint64_t b, bool accumulate) {
  ::cuda_host::current->open_products.push_back(
      {&c[0][0], kCount, accumulate, nullptr, a, b, false, &float_of_bits<T>});
}
template <class T, int kCount>
void multiply_registers(float (&c)[kCount][4], const uint32_t (&a)[4], uint64_t b) {
  ::cuda_host::current->open_products.push_back(
      {&c[0][0], kCount, true, a, 0, b, true, &float_of_bits<T>});
}

}  // namespace pykvcache::cuda
