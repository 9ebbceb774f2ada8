// Runs CUDA kernels as host C++: one CTA at a time, every CUDA thread with its own stack.
//
//   default           threads of a CTA are fibers of one OS thread, switched at barriers and warp
//                     collectives only: fast, and the same order every time
//   KV_HOST_THREADS   one OS thread per CUDA thread: under ThreadSanitizer a missing barrier is a
//   race
//   KV_HOST_PTX       kernels are not run here but handed to whoever asked for them
//
// Shared memory is full of NaN when a CTA starts, and a warp collective orders no memory: under
// ThreadSanitizer only __syncwarp and __syncthreads do. Read next: ptx_host.h.
#pragma once

#include "cuda_host/boxes.h"
#ifndef KV_HOST_THREADS
#include "cuda_host/fibers.h"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace cuda_host {

template <class Kernel, class Params>
struct Launch {
  Kernel kernel;
  const Params& params;
  dim3 grid, block;
  std::vector<unsigned char> storage;
  unsigned char* shared;
  size_t shared_bytes;
  Meeting cta;
  EndMeeting end;
  NamedBarrier named[16];
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Thread> threads;

  Launch(Kernel k, dim3 g, dim3 b, size_t bytes, const Params& p)
      : kernel(k),
        params(p),
        grid(g),
        block(b),
        storage(bytes + 1024),
        shared_bytes(bytes),
        cta(static_cast<int>(b.x)),
        end(static_cast<int>(b.x)),
        threads(b.x) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
    for (unsigned w = 0; w < (b.x + kWarp - 1) / kWarp; ++w)
      warps.push_back(std::make_unique<Warp>(std::min<int>(kWarp, b.x - w * kWarp)));
    for (unsigned t = 0; t < b.x; ++t) {
      threads[t].warp = warps[t / kWarp].get();
      threads[t].cta = &cta;
      threads[t].named = named;
      threads[t].shared = shared;
      threads[t].shared_bytes = bytes;
      threads[t].lane = t % kWarp;
      threads[t].thread_idx = {t, 0, 0};
      threads[t].block_dim = b;
      threads[t].grid_dim = g;
    }
    poison();
  }

  void poison() { std::memset(shared, 0xff, shared_bytes); }  // NaN in every float format

  // What one CUDA thread does: its part of every CTA.
  void run(Thread& self) {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          self.block_idx = {x, y, z};
          kernel(params);
          for (const auto& group : self.copy_groups)
            if (!group.empty()) stop("a kernel ended before it waited for its cp.async copies");
          if (!self.open_copies.empty()) stop("a kernel ended with uncommitted cp.async copies");
          if (!self.open_products.empty() || !self.product_groups.empty())
            stop("a kernel ended before it waited for its wgmma products");
          self.copy_groups.clear();
          end.arrive(self.thread_idx.x == 0, [&] {
            for (const NamedBarrier& barrier : named)
              if (static_cast<uint32_t>(barrier.state) != 0)
                stop("a kernel ended with arrivals at a named barrier that nobody waited for");
            if (!late_boxes().empty()) stop("a kernel ended before its boxes had arrived");
            poison();
          });
        }
  }
};

#ifdef KV_HOST_PTX
// The function as a name for the kernel, what it is launched with, and its one parameter.
using Launcher = void (*)(const void* kernel, const unsigned* grid, unsigned threads,
                          size_t shared_bytes, const void* params, size_t params_bytes);

inline Launcher& launcher() {
  static Launcher set = nullptr;
  return set;
}

template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Params& params) {
  const unsigned sizes[] = {grid.x, grid.y, grid.z};
  launcher()(reinterpret_cast<const void*>(kernel), sizes, block.x, shared_bytes, &params,
             sizeof(params));
}
#elif defined(KV_HOST_THREADS)
// Hundreds of threads may wait like this: they must not take the processor from the others.
inline void yield() {
  using Clock = std::chrono::steady_clock;
  static thread_local uint64_t seen = ~uint64_t{0};
  static thread_local Clock::time_point since;
  const uint64_t now = operations().load(std::memory_order_relaxed);
  if (now != seen) {
    seen = now;
    since = Clock::now();
  } else if (Clock::now() - since > std::chrono::seconds(60)) {
    stop("deadlock: nothing has happened at a barrier for a minute");
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Params& params) {
  Launch<Kernel, Params> all(kernel, grid, block, shared_bytes, params);
  std::vector<std::thread> running;
  for (Thread& thread : all.threads)
    running.emplace_back([&all, &thread] {
      current = &thread;
      all.run(thread);
    });
  for (auto& thread : running) thread.join();
}
#else
template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Params& params) {
  using All = Launch<Kernel, Params>;
  All all(kernel, grid, block, shared_bytes, params);
  Scheduler::get().run(
      block.x,
      [](void* argument, size_t index) {
        All& launch = *static_cast<All*>(argument);
        current = &launch.threads[index];
        launch.run(launch.threads[index]);
      },
      &all);
  current = nullptr;
}
#endif

}  // namespace cuda_host

#define threadIdx (::cuda_host::current->thread_idx)
#define blockIdx (::cuda_host::current->block_idx)
#define blockDim (::cuda_host::current->block_dim)
#define gridDim (::cuda_host::current->grid_dim)

inline void __syncthreads() {
  cuda_host::current->cta->arrive(threadIdx.x == 0, [] {});
}

inline void __syncwarp() {
  cuda_host::current->warp->barrier.arrive(cuda_host::current->lane == 0, [] {});
}

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  struct Message {
    T value;
    int from;
  };
  const int lane = cuda_host::current->lane;
  const Message message{value, lane / width * width + from % width};
  return cuda_host::collective<T>(message, [](auto&& in, auto&& out) {
    for (int lane = 0; lane < 32; ++lane) out(lane) = in(in(lane).from).value;
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return __shfl_sync(mask, value, cuda_host::current->lane ^ flip);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = cuda_host::current->lane;
  return __shfl_sync(mask, value, lane < delta ? lane : lane - delta);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return cuda_host::collective<unsigned>(int{vote}, [](auto&& in, auto&& out) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(in(lane)) << lane;
    for (int lane = 0; lane < 32; ++lane) out(lane) = votes;
  });
}

template <class Combine>
unsigned __reduce_sync(unsigned value, Combine&& combine) {
  return cuda_host::collective<unsigned>(value, [&](auto&& in, auto&& out) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all = combine(all, in(lane));
    for (int lane = 0; lane < 32; ++lane) out(lane) = all;
  });
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return __reduce_sync(value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return __reduce_sync(value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}

inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
