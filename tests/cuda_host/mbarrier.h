// Barriers in shared memory (mbarrier) and named barriers, after PTX ISA 9.0, "Parallel
// synchronization: mbarrier" and "bar". Read cuda_host.h first.
#pragma once

#include <atomic>

#include "cuda_host/threads.h"

namespace cuda_host {

// Somebody got further: waiting threads are not in a deadlock.
inline void note_progress() {
#ifdef KV_HOST_THREADS
  operations().fetch_add(1, std::memory_order_relaxed);
#else
  Meeting::progress() = 0;
#endif
}

using Barrier = uint64_t;  // in shared memory

struct BarrierState {
  int pending;   // arrivals that the current phase still waits for
  int expected;  // arrivals of a phase
  int bytes;     // that the current phase still waits for; may be negative for a while
  bool phase;    // parity of the current phase

  static BarrierState unpack(uint64_t bits) {
    if (bits == ~uint64_t{0}) stop("mbarrier: used before it was initialised");
    return {static_cast<int16_t>(bits), static_cast<int16_t>(bits >> 16),
            static_cast<int>(bits >> 32 & 0x7fffffff) - (1 << 30), (bits >> 63) != 0};
  }
  uint64_t pack() const {
    return static_cast<uint16_t>(pending) | uint64_t{static_cast<uint16_t>(expected)} << 16 |
           static_cast<uint64_t>(bytes + (1 << 30)) << 32 | uint64_t{phase} << 63;
  }
};

// One operation on a barrier: arrivals that come, bytes that are expected (positive) or have
// landed.
inline void change_barrier(Barrier* barrier, int arrivals, int bytes) {
  std::atomic_ref<uint64_t> cell(*barrier);
  uint64_t before = cell.load(std::memory_order_relaxed), after = 0;
  do {
    BarrierState state = BarrierState::unpack(before);
    state.pending -= arrivals;
    state.bytes += bytes;
    if (state.pending < 0) stop("mbarrier: more arrivals than it was initialised for");
    if (state.bytes >= 1 << 20 || state.bytes <= -(1 << 20)) stop("mbarrier: too many bytes");
    if (state.pending == 0 && state.bytes == 0)
      state = {state.expected, state.expected, 0, !state.phase};
    after = state.pack();
  } while (!cell.compare_exchange_weak(before, after, std::memory_order_acq_rel));
  note_progress();
}

inline bool phase_ended(Barrier* barrier, uint32_t parity) {
  const uint64_t bits = std::atomic_ref<uint64_t>(*barrier).load(std::memory_order_acquire);
  return BarrierState::unpack(bits).phase != (parity != 0);
}

// Arrives; returns the generation that ends with this one.
inline uint32_t arrive_at_named(int id, int threads) {
  if (id < 1 || id > 15 || threads % kWarp != 0) stop("bar: id or number of threads not allowed");
  auto& state = current->named[id].state;
  uint64_t before = state.load(std::memory_order_relaxed), after = 0;
  do {
    after = before + 1;
    if (static_cast<int>(after & 0xffffffff) == threads) after = ((before >> 32) + 1) << 32;
  } while (!state.compare_exchange_weak(before, after, std::memory_order_acq_rel));
  note_progress();
  return static_cast<uint32_t>(before >> 32);
}

inline void sync_at_named(int id, int threads) {
  const uint32_t mine = arrive_at_named(id, threads);
  while (current->named[id].state.load(std::memory_order_acquire) >> 32 == mine) yield();
}

}  // namespace cuda_host
