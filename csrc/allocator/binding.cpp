// Python types of the allocator, on the limited API of 3.10. A lock guards each allocator; no
// Python code runs while it is held. The GIL is released only for calls that walk the whole pool.
#include "allocator/binding.h"

#include <atomic>
#include <memory>
#include <mutex>

#include "allocator/allocator.h"
#include "allocator/batch.h"
#include "allocator/python_values.h"
#include "allocator/stats.h"

namespace pykvcache::python {
namespace {

struct Shared {
  explicit Shared(Allocator&& allocator) : allocator(std::move(allocator)) {}
  std::mutex mutex;
  Allocator allocator;
};

struct AllocatorObject {
  PyObject_HEAD std::shared_ptr<Shared> shared;
};

struct BatchObject {
  PyObject_HEAD std::shared_ptr<Shared> shared;
  Batch batch;
  struct {
    int64_t tokens, columns;
  } needs;
};

PyTypeObject* allocator_type = nullptr;
PyTypeObject* batch_type = nullptr;

template <class F>
decltype(auto) locked(Shared& shared, F&& use) {
  const std::lock_guard lock(shared.mutex);
  return use(shared.allocator);
}

template <class F>
decltype(auto) locked_without_gil(Shared& shared, F&& use) {
  const WithoutGil released;
  const std::lock_guard lock(shared.mutex);
  return use(shared.allocator);
}

uint32_t next_tag() {
  static std::atomic<uint32_t> count = 0;
  return 1 + count++ % 2047;
}

// Raises pykvcache.errors.<name>(message, *numbers).
template <class... Numbers>
void raise(const char* name, const char* text, Numbers... numbers) {
  const char* formats[] = {"s", "sL", "sLL", "sLLL"};
  try {
    const Owned module(PyImport_ImportModule("pykvcache.errors"));
    const Owned type(PyObject_GetAttrString(module.get(), name));
    const Owned error(PyObject_CallFunction(type.get(), formats[sizeof...(numbers)], text,
                                            static_cast<long long>(numbers)...));
    PyErr_SetObject(type.get(), error.get());
  } catch (const ErrorIsSet&) {
  }
}

void raise_current() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const OutOfBlocks& error) {
    raise("OutOfBlocks", error.what(), error.needed, error.free, error.total);
  } catch (const DoubleFree& error) {
    raise("DoubleFree", error.what());
  } catch (const UnknownSequence& error) {
    raise("UnknownSequence", error.what());
  } catch (const UnknownBlock& error) {
    raise("UnknownBlock", error.what());
  } catch (const IntegrityError& error) {
    raise("IntegrityError", error.what());
  } catch (const SnapshotError& error) {
    raise("SnapshotError", error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

using Args = PyObject* const*;

// A method of fixed arity whose C++ exceptions become Python ones.
template <class Object, auto Function, int Arity>
PyObject* method(PyObject* self, Args args, Py_ssize_t count) {
  if (count != Arity) {
    return PyErr_Format(PyExc_TypeError, "takes %d arguments, got %zd", Arity, count);
  }
  try {
    return Function(*reinterpret_cast<Object*>(self), args);
  } catch (...) {
    raise_current();
    return nullptr;
  }
}

template <class Object, auto Function, int Arity>
PyMethodDef define(const char* name) {
  const auto function = method<Object, Function, Arity>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
          nullptr};
}

PyObject* copies_list(const Copies& copies) {
  Owned list(PyList_New(static_cast<Py_ssize_t>(copies.size())));
  for (size_t group = 0; group < copies.size(); ++group) {
    const auto bytes = static_cast<Py_ssize_t>(copies[group].size() * sizeof(CopyPair));
    const char* pairs = reinterpret_cast<const char*>(copies[group].data());
    PyObject* array = checked(PyByteArray_FromStringAndSize(pairs, bytes));
    PyList_SetItem(list.get(), static_cast<Py_ssize_t>(group), array);
  }
  return list.release();
}

// ---- Allocator ----

PyObject* wrap(Allocator&& allocator) {
  auto shared = std::make_shared<Shared>(std::move(allocator));
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(allocator_type, Py_tp_alloc));
  auto* self = reinterpret_cast<AllocatorObject*>(checked(allocate(allocator_type, 0)));
  new (&self->shared) std::shared_ptr<Shared>(std::move(shared));
  return reinterpret_cast<PyObject*>(self);
}

PyObject* new_allocator(PyTypeObject*, PyObject* args, PyObject*) {
  long long num_blocks, block_size;
  PyObject* layers;
  if (!PyArg_ParseTuple(args, "LLO", &num_blocks, &block_size, &layers)) return nullptr;
  try {
    return wrap(Allocator(num_blocks, block_size, IntArgument(layers), next_tag()));
  } catch (...) {
    raise_current();
    return nullptr;
  }
}

template <class Object>
void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  if constexpr (std::is_same_v<Object, BatchObject>) {
    reinterpret_cast<BatchObject*>(self)->batch.~Batch();
  }
  reinterpret_cast<Object*>(self)->shared.~shared_ptr();
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* allocate(AllocatorObject& self, Args args) {
  const IntArgument lengths(args[0]);
  ArrayResult<int64_t> handles(lengths.size());
  locked(*self.shared, [&](Allocator& a) { a.allocate(lengths, handles.data()); });
  return handles.release();
}

PyObject* append(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), counts(args[1], seqs.size());
  const Copies copies = locked(*self.shared, [&](Allocator& a) { return a.append(seqs, counts); });
  return copies.empty() ? none() : copies_list(copies);
}

PyObject* reserve(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), capacities(args[1], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.reserve(seqs, capacities); });
  return none();
}

PyObject* fork(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]);
  const int64_t n = to_int(args[1]);
  ArrayResult<int64_t> children(n > 0 ? seqs.size() * n : 0);
  locked(*self.shared, [&](Allocator& a) { a.fork(seqs, n, children.data()); });
  return children.release();
}

PyObject* select(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), index(args[1]);
  ArrayResult<int64_t> selected(index.size());
  locked(*self.shared, [&](Allocator& a) { a.select(seqs, index, selected.data()); });
  return selected.release();
}

PyObject* truncate(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), lengths(args[1], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.truncate(seqs, lengths); });
  return none();
}

PyObject* release_before(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), positions(args[1], seqs.size());
  const int64_t group = to_int(args[2]);
  locked(*self.shared, [&](Allocator& a) { a.release_before(seqs, positions, group); });
  return none();
}

PyObject* free(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]);
  locked(*self.shared, [&](Allocator& a) { a.free(seqs); });
  return none();
}

PyObject* pin(AllocatorObject& self, Args args) {
  const IntArgument blocks(args[0]);
  locked(*self.shared, [&](Allocator& a) { a.pin(blocks); });
  return none();
}

PyObject* unpin(AllocatorObject& self, Args args) {
  const IntArgument blocks(args[0]);
  locked(*self.shared, [&](Allocator& a) { a.unpin(blocks); });
  return none();
}

PyObject* pin_sequences(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]);
  const auto blocks = locked(*self.shared, [&](Allocator& a) { return a.pin_sequences(seqs); });
  return ArrayResult<int64_t>(blocks).release();
}

PyObject* grow(AllocatorObject& self, Args args) {
  const int64_t num_blocks = to_int(args[0]);
  locked_without_gil(*self.shared, [&](Allocator& a) { a.grow(num_blocks); });
  return none();
}

PyObject* lengths(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]);
  ArrayResult<int32_t> out(seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.lengths(seqs, out.data()); });
  return out.release();
}

PyObject* block_table(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]);
  const int64_t group = to_int(args[1]);
  std::vector<int32_t> table;
  locked(*self.shared, [&](Allocator& a) { a.block_table(seqs, group, table); });
  return ArrayResult<int32_t>(table).release();
}

PyObject* slot_mapping(AllocatorObject& self, Args args) {
  const IntArgument seqs(args[0]), counts(args[1], seqs.size());
  const int64_t group = to_int(args[2]), width = to_int(args[3]);
  std::vector<int64_t> slots;
  locked(*self.shared, [&](Allocator& a) { a.slot_mapping(seqs, counts, group, width, slots); });
  return ArrayResult<int64_t>(slots).release();
}

template <auto Member>
PyObject* number(AllocatorObject& self, Args) {
  return PyLong_FromLongLong(
      locked(*self.shared, [](Allocator& a) -> long long { return (a.*Member)(); }));
}

constexpr std::pair<const char*, int64_t Stats::*> kStats[] = {
    {"live", &Stats::live},
    {"reserved", &Stats::reserved},
    {"internal", &Stats::internal},
    {"rounding", &Stats::rounding},
    {"external", &Stats::external},
    {"idle", &Stats::idle},
    {"num_blocks", &Stats::num_blocks},
    {"used_blocks", &Stats::used_blocks},
    {"peak_blocks", &Stats::peak_blocks},
    {"table_entries", &Stats::table_entries},
    {"table_blocks", &Stats::table_blocks},
    {"pinned_blocks", &Stats::pinned_blocks},
    {"sequences", &Stats::sequences},
    {"tokens", &Stats::tokens},
    {"copies", &Stats::copies},
    {"forks", &Stats::forks},
    {"refusals", &Stats::refusals},
    {"steps", &Stats::steps},
    {"block_steps", &Stats::block_steps},
    {"metadata_bytes", &Stats::metadata_bytes}};

// Arguments for pykvcache.pool_stats.PoolStats.
PyObject* stats(AllocatorObject& self, Args) {
  const Stats stats = locked_without_gil(*self.shared, [](Allocator& a) { return a.stats(); });
  Owned result(PyDict_New());
  for (const auto& [name, member] : kStats) result.set(name, PyLong_FromLongLong(stats.*member));
  const auto groups = static_cast<Py_ssize_t>(stats.group_blocks.size());
  Owned group_blocks(PyTuple_New(groups));
  for (Py_ssize_t i = 0; i < groups; ++i) {
    PyObject* value = checked(PyLong_FromLongLong(stats.group_blocks[i]));
    PyTuple_SetItem(group_blocks.get(), i, value);
  }
  result.set("group_blocks", group_blocks.release());
  return result.release();
}

PyObject* check_integrity(AllocatorObject& self, Args) {
  locked_without_gil(*self.shared, [](Allocator& a) { a.check_integrity(); });
  return none();
}

PyObject* snapshot(AllocatorObject& self, Args) {
  const std::string bytes =
      locked_without_gil(*self.shared, [](Allocator& a) { return a.snapshot(); });
  return PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
}

PyObject* restore(AllocatorObject& self, Args args) {
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(args[0], &data, &size) != 0) return nullptr;
  const std::string bytes(data, size);
  locked_without_gil(*self.shared, [&](Allocator& a) { a.restore(bytes); });
  return none();
}

PyObject* clone(AllocatorObject& self, Args) {
  return wrap(locked_without_gil(*self.shared, [](Allocator& a) { return Allocator(a); }));
}

PyObject* damage_refs(AllocatorObject& self, Args args) {
  const IntArgument blocks(args[0]);
  locked(*self.shared, [&](Allocator& a) { a.damage_refs(static_cast<int32_t>(blocks[0])); });
  return none();
}

// ---- Batch ----

PyObject* new_batch(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* owner;
  if (!PyArg_ParseTuple(args, "O", &owner)) return nullptr;
  if (Py_TYPE(owner) != allocator_type) {
    return PyErr_Format(PyExc_TypeError, "expected an Allocator");
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  auto* self = reinterpret_cast<BatchObject*>(allocate(type, 0));
  if (self == nullptr) return nullptr;
  const auto& shared = reinterpret_cast<AllocatorObject*>(owner)->shared;
  new (&self->shared) std::shared_ptr<Shared>(shared);
  new (&self->batch) Batch(shared->allocator.groups());
  return reinterpret_cast<PyObject*>(self);
}

PyObject* bind(BatchObject& self, Args args) {
  self.batch.bind(IntArgument(args[0]));
  return none();
}

// (tables, slots, seq_lens, cu_seqlens_q, columns, tokens): addresses, and capacities.
PyObject* set_arrays(BatchObject& self, Args args) {
  const IntArgument tables(args[0]), slots(args[1]);
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  BatchArrays arrays;
  for (size_t group = 0; group < tables.size(); ++group) {
    arrays.block_tables.push_back(static_cast<int32_t*>(pointer(tables[group])));
    arrays.slot_mappings.push_back(static_cast<int64_t*>(pointer(slots[group])));
  }
  arrays.seq_lens = static_cast<int32_t*>(pointer(to_int(args[2])));
  arrays.cu_seqlens_q = static_cast<int32_t*>(pointer(to_int(args[3])));
  arrays.columns = to_int(args[4]);
  arrays.tokens = to_int(args[5]);
  self.batch.set_arrays(arrays);
  return none();
}

PyObject* set_reach(BatchObject& self, Args args) {
  const IntArgument windows(args[0]), chunks(args[1]);
  std::vector<Reach> reach(windows.size());
  for (size_t group = 0; group < reach.size(); ++group) {
    reach[group] = {static_cast<int32_t>(windows[group]), static_cast<int32_t>(chunks[group])};
  }
  self.batch.set_reach(std::move(reach));
  return none();
}

// (counts, width, release) -> (tokens, max_count, copies or None), or None if the arrays are too
// small: then nothing happened and needs() says how large they must be.
PyObject* step(BatchObject& self, Args args) {
  const IntArgument counts(args[0], self.batch.rows());
  const int64_t width = to_int(args[1]);
  const bool release = to_int(args[2]) != 0;
  const Batch::Result result = locked(
      *self.shared, [&](Allocator& a) { return self.batch.step(a, counts, width, release); });
  if (!result.fits) {
    self.needs = {result.tokens, result.columns};
    return none();
  }
  PyObject* copies = result.copies.empty() ? none() : copies_list(result.copies);
  return Py_BuildValue("LiN", static_cast<long long>(result.tokens), result.max_count, copies);
}

PyObject* needs(BatchObject& self, Args) {
  const auto [tokens, columns] = self.needs;
  return Py_BuildValue("LL", static_cast<long long>(tokens), static_cast<long long>(columns));
}

PyMethodDef allocator_methods[] = {
    define<AllocatorObject, allocate, 1>("allocate"),
    define<AllocatorObject, append, 2>("append"),
    define<AllocatorObject, reserve, 2>("reserve"),
    define<AllocatorObject, fork, 2>("fork"),
    define<AllocatorObject, select, 2>("select"),
    define<AllocatorObject, truncate, 2>("truncate"),
    define<AllocatorObject, release_before, 3>("release_before"),
    define<AllocatorObject, free, 1>("free"),
    define<AllocatorObject, pin, 1>("pin"),
    define<AllocatorObject, unpin, 1>("unpin"),
    define<AllocatorObject, pin_sequences, 1>("pin_sequences"),
    define<AllocatorObject, grow, 1>("grow"),
    define<AllocatorObject, lengths, 1>("lengths"),
    define<AllocatorObject, block_table, 2>("block_table"),
    define<AllocatorObject, slot_mapping, 4>("slot_mapping"),
    define<AllocatorObject, number<&Allocator::num_blocks>, 0>("num_blocks"),
    define<AllocatorObject, number<&Allocator::num_free>, 0>("num_free"),
    define<AllocatorObject, number<&Allocator::peak>, 0>("peak"),
    define<AllocatorObject, number<&Allocator::num_sequences>, 0>("num_sequences"),
    define<AllocatorObject, stats, 0>("stats"),
    define<AllocatorObject, check_integrity, 0>("check_integrity"),
    define<AllocatorObject, snapshot, 0>("snapshot"),
    define<AllocatorObject, restore, 1>("restore"),
    define<AllocatorObject, clone, 0>("clone"),
    define<AllocatorObject, damage_refs, 1>("_damage_refs"),
    {nullptr, nullptr, 0, nullptr}};

PyMethodDef batch_methods[] = {define<BatchObject, bind, 1>("bind"),
                               define<BatchObject, set_arrays, 6>("set_arrays"),
                               define<BatchObject, set_reach, 2>("set_reach"),
                               define<BatchObject, step, 3>("step"),
                               define<BatchObject, needs, 0>("needs"),
                               {nullptr, nullptr, 0, nullptr}};

template <class Object>
PyTypeObject* add_type(PyObject* module, const char* name, newfunc create, PyMethodDef* methods) {
  PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(destroy<Object>)},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  PyType_Spec spec = {name, sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return nullptr;
  if (PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type)) != 0) return nullptr;
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace
}  // namespace pykvcache::python

int pykvcache_add_allocator(PyObject* module) {
  using namespace pykvcache::python;
  allocator_type =
      add_type<AllocatorObject>(module, "pykvcache._C.Allocator", new_allocator, allocator_methods);
  batch_type = add_type<BatchObject>(module, "pykvcache._C.Batch", new_batch, batch_methods);
  return allocator_type != nullptr && batch_type != nullptr ? 0 : -1;
}
