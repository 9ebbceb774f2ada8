// Threads of an emulated CTA: where they meet, and what a warp exchanges. Read cuda_host.h first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
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
#include <chrono>
#include <thread>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
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

void yield();  // let others run, while this thread waits for them

#ifdef KV_HOST_THREADS
// Operations on barriers so far. A thread that waits long without any is in a deadlock.
inline std::atomic<uint64_t>& operations() {
  static std::atomic<uint64_t> count{0};
  return count;
}
#endif

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

#ifdef KV_HOST_THREADS
// Where the threads of a CTA end. Not a std::barrier: waiting at one synchronises with whoever
// waits at another one whose address has the same hash, and threads that end early would hide
// races.
class EndMeeting {
 public:
  explicit EndMeeting(int expected) : expected_(expected) {}
  template <class Action>
  void arrive(bool, Action&& action) {
    const unsigned mine = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == expected_) {
      action();
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(mine + 1, std::memory_order_release);
    }
    while (generation_.load(std::memory_order_acquire) == mine)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  int expected_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
};
#else
using EndMeeting = Meeting;
#endif

constexpr int kWarp = 32;
constexpr int kMessage = 64;  // bytes that a lane can give to a collective

struct Warp {
  explicit Warp(int lanes) : barrier(lanes), exchange(lanes) {}
  Meeting barrier, exchange;
  float left[16][16], right[16][256];  // operands of the wgmma product that is computed now
  alignas(16) unsigned char in[kWarp][kMessage];
  alignas(16) unsigned char out[2][kWarp][kMessage];
};

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  int bytes;
};

// wgmma: c += a b, or c = a b; b [16, 8 columns] and, unless it is in registers, a [64, 16] are
// named by descriptors of shared memory.
struct Product {
  float* c;
  int columns;  // of c, in eights
  bool accumulate;
  const uint32_t* a_registers;  // nullptr: a is in shared memory
  uint64_t a, b;
  bool b_columns_contiguous;
  float (*to_float)(uint16_t);
};

// bar.sync and bar.arrive: the generation grows when `expected` threads have come.
struct NamedBarrier {
  std::atomic<uint64_t> state{0};  // generation << 32 | arrived
};

struct Thread {
  Warp* warp = nullptr;
  Meeting* cta = nullptr;
  NamedBarrier* named = nullptr;  // [16]
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int lane = 0;
  unsigned collectives = 0;
  dim3 thread_idx, block_idx, block_dim, grid_dim;
  std::vector<Copy> open_copies;  // cp.async of the group that is not committed yet
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Product> open_products;  // wgmma of the group that is not committed yet
  std::deque<std::vector<Product>> product_groups;
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
  uint64_t warpgroup_products = 0;  // of single warps
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

}  // namespace cuda_host
