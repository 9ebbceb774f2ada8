// What the Python types of the allocator have in common: their objects and the lock.
#pragma once

#include <Python.h>

#include <memory>
#include <mutex>

#include "allocator/allocator.h"
#include "python/types.h"

namespace pykvcache::python {

// An allocator and the lock that guards it. No Python code runs while it is held: it may switch to
// a thread that waits for the lock.
struct Shared {
  explicit Shared(Allocator&& allocator) : allocator(std::move(allocator)) {}
  std::mutex mutex;
  Allocator allocator;
};

struct AllocatorObject {
  PyObject base;
  std::shared_ptr<Shared> shared;
};

extern PyTypeObject* allocator_type;

template <class F>
decltype(auto) locked(Shared& shared, F&& use) {
  const std::lock_guard lock(shared.mutex);
  return use(shared.allocator);
}

// For calls that walk the whole pool.
template <class F>
decltype(auto) locked_without_gil(Shared& shared, F&& use) {
  const WithoutGil released;
  const std::lock_guard lock(shared.mutex);
  return use(shared.allocator);
}

// A list of one bytearray of int64 pairs for each group.
PyObject* copies_list(const Copies& copies);

// binding_prefix.cpp
PyObject* allocate_cached(AllocatorObject& self, Args args);
PyObject* lookup(AllocatorObject& self, Args args);
PyObject* record(AllocatorObject& self, Args args);
PyObject* set_priority(AllocatorObject& self, Args args);
PyObject* forget_prefixes(AllocatorObject& self, Args args);
PyObject* collide_hashes(AllocatorObject& self, Args args);

int add_batch_type(PyObject* module);  // 0, or -1 with a Python error set

}  // namespace pykvcache::python
