// Runs CUDA kernels as host C++: one CTA at a time, every CUDA thread with its own stack.
//
//   default           threads of a CTA are fibers of one OS thread, switched at barriers and warp
//                     collectives only: fast, and the same order every time
//   KV_HOST_THREADS   one OS thread per CUDA thread, for ThreadSanitizer: a missing barrier is a
//   race
//
// Shared memory is full of NaN when a CTA starts, and a warp collective orders no memory: under
// ThreadSanitizer only __syncwarp and __syncthreads do. Read next: ptx_host.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <type_traits>
#include <vector>
#ifdef KV_HOST_THREADS
#include <barrier>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace cuda_host {

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// While one lives, ThreadSanitizer sees neither this thread's accesses nor its synchronisation.
struct Unseen {
#ifdef __SANITIZE_THREAD__
  Unseen() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
};

[[noreturn]] inline void stop(const char* message) {
  std::fprintf(stderr, "cuda_host: %s\n", message);
  std::abort();
}

void yield();  // fibers: let the next thread run

// A barrier of `expected` threads; the last one to arrive runs an action before anybody leaves.
class Meeting {
 public:
#ifdef KV_HOST_THREADS
  explicit Meeting(int expected) : first_(expected), second_(expected) {}
  template <class Action>
  void arrive(bool leader, Action&& action) {
    first_.arrive_and_wait();
    if (leader) action();
    second_.arrive_and_wait();
  }

 private:
  std::barrier<> first_, second_;
#else
  explicit Meeting(int expected) : expected_(expected) {}
  template <class Action>
  void arrive(bool, Action&& action) {
    const unsigned mine = generation_;
    progress() = 0;
    if (++arrived_ == expected_) {
      action();
      arrived_ = 0;
      ++generation_;
      return;
    }
    while (generation_ == mine) yield();
  }
  // Switches since somebody arrived anywhere: many of them mean that nobody ever will.
  static int& progress() {
    static int switches = 0;
    return switches;
  }

 private:
  int expected_, arrived_ = 0;
  unsigned generation_ = 0;
#endif
};

constexpr int kWarp = 32;
constexpr int kMessage = 64;  // bytes that a lane can give to a collective

struct Warp {
  explicit Warp(int lanes) : barrier(lanes), exchange(lanes) {}
  Meeting barrier, exchange;
  alignas(16) unsigned char in[kWarp][kMessage];
  alignas(16) unsigned char out[2][kWarp][kMessage];
};

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  int bytes;
};

struct Thread {
  Warp* warp = nullptr;
  Meeting* cta = nullptr;
  unsigned char* shared = nullptr;
  int lane = 0;
  unsigned collectives = 0;
  dim3 thread_idx, block_idx, block_dim, grid_dim;
  std::vector<Copy> open_copies;  // cp.async of the group that is not committed yet
  std::deque<std::vector<Copy>> copy_groups;
};

inline thread_local Thread* current = nullptr;

// Every lane hands in `mine`; one computes all results, at(lane) -> In&, into out[lane].
template <class Out, class In, class Compute>
Out collective(const In& mine, Compute&& compute) {
  static_assert(sizeof(In) <= kMessage && sizeof(Out) <= kMessage);
  const Unseen unseen;
  Warp& warp = *current->warp;
  const int lane = current->lane;
  auto* out = reinterpret_cast<Out(*)[1]>(warp.out[current->collectives++ % 2]);
  std::memcpy(warp.in[lane], &mine, sizeof(In));
  auto slots = reinterpret_cast<unsigned char*>(out);
  warp.exchange.arrive(lane == 0, [&] {
    compute([&](int other) -> const In& { return *reinterpret_cast<In*>(warp.in[other]); },
            [&](int other) -> Out& { return *reinterpret_cast<Out*>(slots + other * kMessage); });
  });
  Out result;
  std::memcpy(&result, slots + lane * kMessage, sizeof(Out));
  return result;
}

struct Counts {
  uint64_t bank_conflicts = 0;
  uint64_t matrix_products = 0;
};

inline Counts& counts() {
  static Counts all;
  return all;
}

// The barrier or wait that a test leaves out, named in KV_OMITTABLE; empty: none.
inline const char*& omitted() {
  static const char* name = "";
  return name;
}
inline bool is_omitted(const char* name) { return std::strcmp(omitted(), name) == 0; }

// ---- launching

template <class Kernel, class Params>
struct Launch {
  Kernel kernel;
  const Params& params;
  dim3 grid, block;
  std::vector<unsigned char> storage;
  unsigned char* shared;
  size_t shared_bytes;
  Meeting cta;
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
        threads(b.x) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
    for (unsigned w = 0; w < (b.x + kWarp - 1) / kWarp; ++w)
      warps.push_back(std::make_unique<Warp>(std::min<int>(kWarp, b.x - w * kWarp)));
    for (unsigned t = 0; t < b.x; ++t) {
      threads[t].warp = warps[t / kWarp].get();
      threads[t].cta = &cta;
      threads[t].shared = shared;
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
          self.copy_groups.clear();
          cta.arrive(self.thread_idx.x == 0, [&] { poison(); });
        }
  }
};

#ifdef KV_HOST_THREADS
inline void yield() {}

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
// Fibers: started by makecontext, afterwards switched by _setjmp and _longjmp, which unlike
// swapcontext make no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
};

struct Scheduler {
  static constexpr size_t kStack = 256 << 10;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  jmp_buf home;
  size_t running = 0;
  void (*entry)(void*, size_t) = nullptr;
  void* argument = nullptr;

  static Scheduler& get() {
    static thread_local Scheduler scheduler;
    return scheduler;
  }

  [[noreturn]] void enter(size_t next) {
    running = next;
    Fiber& fiber = fibers[next];
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.start);
    std::abort();
  }

  // The next fiber that is not done after the running one.
  size_t successor() const {
    for (size_t i = 1; i <= fibers.size(); ++i) {
      const size_t next = (running + i) % fibers.size();
      if (!fibers[next].done) return next;
    }
    return fibers.size();
  }

  static void main() {
    Scheduler& self = get();
    self.entry(self.argument, self.running);
    self.fibers[self.running].done = true;
    const size_t next = self.successor();
    if (next == self.fibers.size()) _longjmp(self.home, 1);
    self.enter(next);
  }

  void run(size_t count, void (*function)(void*, size_t), void* with) {
    entry = function;
    argument = with;
    fibers.assign(count, Fiber{});
    while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
    for (size_t i = 0; i < count; ++i) {
      getcontext(&fibers[i].start);
      fibers[i].start.uc_stack = {.ss_sp = stacks[i].get(), .ss_flags = 0, .ss_size = kStack};
      fibers[i].start.uc_link = nullptr;
      makecontext(&fibers[i].start, &Scheduler::main, 0);
    }
    if (!_setjmp(home)) enter(0);
  }
};

inline void yield() {
  Scheduler& scheduler = Scheduler::get();
  Thread* const me = current;
  if (++Meeting::progress() > 4 * static_cast<int>(scheduler.fibers.size()))
    stop("deadlock: not every thread reaches a barrier or a warp collective");
  const size_t next = scheduler.successor();
  if (!_setjmp(scheduler.fibers[scheduler.running].state)) scheduler.enter(next);
  current = me;
}

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
T __shfl_sync(unsigned, T value, int from) {
  struct Message {
    T value;
    int from;
  };
  return cuda_host::collective<T>(Message{value, from}, [](auto&& in, auto&& out) {
    for (int lane = 0; lane < 32; ++lane) out(lane) = in(in(lane).from % 32).value;
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

inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
