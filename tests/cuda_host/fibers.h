// Fibers: the CUDA threads of a CTA on one OS thread. Started by makecontext, afterwards switched
// by _setjmp and _longjmp, which unlike swapcontext make no system call.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <memory>
#include <vector>

#include "cuda_host/threads.h"

namespace cuda_host {

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

}  // namespace cuda_host
