// The Python type Allocator, on the limited API of 3.10.
#include "allocator/binding.h"

#include <atomic>

#include "allocator/binding_types.h"
#include "allocator/stats.h"
#include "allocator/timing.h"

namespace pykvcache::python {

PyTypeObject* allocator_type = nullptr;

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

namespace {

uint32_t next_tag() {
  static std::atomic<uint32_t> count = 0;
  return 1 + count++ % SequenceStore::kMaxTag;
}

PyObject* wrap(Allocator&& allocator) {
  auto shared = std::make_shared<Shared>(std::move(allocator));
  auto* self = allocate_object<AllocatorObject>(allocator_type);
  new (&self->shared) std::shared_ptr<Shared>(std::move(shared));
  return reinterpret_cast<PyObject*>(self);
}

PyObject* new_allocator(PyTypeObject*, PyObject* args, PyObject*) {
  return guarded([&] {
    long long num_blocks, block_size;
    PyObject *layers, *windows = nullptr;
    if (!PyArg_ParseTuple(args, "LLO|O", &num_blocks, &block_size, &layers, &windows)) {
      throw ErrorIsSet{};
    }
    Allocator allocator(num_blocks, block_size, IntArgument("layers", layers), next_tag());
    if (windows != nullptr) allocator.cache_prefixes(IntArgument("windows", windows));
    return wrap(std::move(allocator));
  });
}

void destroy_allocator(PyObject* self) {
  reinterpret_cast<AllocatorObject*>(self)->shared.~shared_ptr();
  free_object(self);
}

PyObject* allocate(AllocatorObject& self, Args args) {
  const IntArgument lengths("lengths", args[0]);
  ArrayResult<int64_t> handles(lengths.size());
  locked(*self.shared, [&](Allocator& a) { a.allocate(lengths, handles.data()); });
  return handles.release();
}

PyObject* append(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), counts("counts", args[1], seqs.size());
  const Copies copies = locked(*self.shared, [&](Allocator& a) { return a.append(seqs, counts); });
  return copies.empty() ? none() : copies_list(copies);
}

PyObject* reserve(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), capacities("capacities", args[1], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.reserve(seqs, capacities); });
  return none();
}

PyObject* fork(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]);
  const int64_t n = to_int("n", args[1]);
  ArrayResult<int64_t> children(n > 0 ? seqs.size() * n : 0);
  locked(*self.shared, [&](Allocator& a) { a.fork(seqs, n, children.data()); });
  return children.release();
}

PyObject* select(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), index("index", args[1]);
  ArrayResult<int64_t> selected(index.size());
  locked(*self.shared, [&](Allocator& a) { a.select(seqs, index, selected.data()); });
  return selected.release();
}

PyObject* truncate(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), lengths("lengths", args[1], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.truncate(seqs, lengths); });
  return none();
}

PyObject* release_before(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), positions("positions", args[1], seqs.size());
  const int64_t group = to_int("group", args[2]);
  locked(*self.shared, [&](Allocator& a) { a.release_before(seqs, positions, group); });
  return none();
}

PyObject* free(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]);
  locked(*self.shared, [&](Allocator& a) { a.free(seqs); });
  return none();
}

PyObject* pin(AllocatorObject& self, Args args) {
  const IntArgument blocks("blocks", args[0]);
  locked(*self.shared, [&](Allocator& a) { a.pin(blocks); });
  return none();
}

PyObject* unpin(AllocatorObject& self, Args args) {
  const IntArgument blocks("blocks", args[0]);
  locked(*self.shared, [&](Allocator& a) { a.unpin(blocks); });
  return none();
}

PyObject* pin_sequences(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]);
  const auto blocks = locked(*self.shared, [&](Allocator& a) { return a.pin_sequences(seqs); });
  return ArrayResult<int64_t>(blocks).release();
}

PyObject* grow(AllocatorObject& self, Args args) {
  const int64_t num_blocks = to_int("num_blocks", args[0]);
  locked_without_gil(*self.shared, [&](Allocator& a) { a.grow(num_blocks); });
  return none();
}

PyObject* lengths(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]);
  ArrayResult<int32_t> out(seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.lengths(seqs, out.data()); });
  return out.release();
}

PyObject* block_table(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]);
  const int64_t group = to_int("group", args[1]);
  std::vector<int32_t> table;
  locked(*self.shared, [&](Allocator& a) { a.block_table(seqs, group, table); });
  return ArrayResult<int32_t>(table).release();
}

PyObject* slot_mapping(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), counts("counts", args[1], seqs.size());
  const int64_t group = to_int("group", args[2]), width = to_int("width", args[3]);
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
    {"metadata_bytes", &Stats::metadata_bytes},
    {"cached_blocks", &Stats::cached_blocks},
    {"prompt_tokens", &Stats::prompt_tokens},
    {"hit_tokens", &Stats::hit_tokens},
    {"evictions", &Stats::evictions},
    {"merged_blocks", &Stats::merged_blocks}};

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
  const IntArgument blocks("blocks", args[0]);
  locked(*self.shared, [&](Allocator& a) { a.damage_refs(static_cast<int32_t>(blocks[0])); });
  return none();
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
    define<AllocatorObject, allocate_cached, 3>("allocate_cached"),
    define<AllocatorObject, lookup, 3>("lookup"),
    define<AllocatorObject, record, 3>("record"),
    define<AllocatorObject, set_priority, 2>("set_priority"),
    define<AllocatorObject, forget_prefixes, 0>("forget_prefixes"),
    define<AllocatorObject, collide_hashes, 0>("_collide_hashes"),
    define<AllocatorObject, grow, 1>("grow"),
    define<AllocatorObject, lengths, 1>("lengths"),
    define<AllocatorObject, block_table, 2>("block_table"),
    define<AllocatorObject, slot_mapping, 4>("slot_mapping"),
    define<AllocatorObject, number<&Allocator::num_blocks>, 0>("num_blocks"),
    define<AllocatorObject, number<&Allocator::num_free>, 0>("num_free"),
    define<AllocatorObject, number<&Allocator::num_cached>, 0>("num_cached"),
    define<AllocatorObject, number<&Allocator::peak>, 0>("peak"),
    define<AllocatorObject, number<&Allocator::num_sequences>, 0>("num_sequences"),
    define<AllocatorObject, stats, 0>("stats"),
    define<AllocatorObject, check_integrity, 0>("check_integrity"),
    define<AllocatorObject, snapshot, 0>("snapshot"),
    define<AllocatorObject, restore, 1>("restore"),
    define<AllocatorObject, clone, 0>("clone"),
    define<AllocatorObject, damage_refs, 1>("_damage_refs"),
    {nullptr, nullptr, 0, nullptr}};

// (num_blocks, repeats) -> {operation: [nanoseconds]}
template <auto Measure>
PyObject* time_operations(PyObject*, PyObject* args) {
  return guarded([&] {
    long long num_blocks, repeats;
    if (!PyArg_ParseTuple(args, "LL", &num_blocks, &repeats)) throw ErrorIsSet{};
    const Timings timings = [&] {
      const WithoutGil released;
      return Measure(num_blocks, repeats);
    }();
    Owned result(PyDict_New());
    for (const auto& [operation, samples] : timings) {
      Owned list(PyList_New(0));
      for (const double nanoseconds : samples) {
        const Owned item(PyFloat_FromDouble(nanoseconds));
        if (PyList_Append(list.get(), item.get()) != 0) throw ErrorIsSet{};
      }
      result.set(operation.c_str(), list.release());
    }
    return result.release();
  });
}

PyMethodDef functions[] = {{"time_allocator", time_operations<time_allocator>, METH_VARARGS,
                            "Nanoseconds of the allocator's operations inside C++."},
                           {"time_prefixes", time_operations<time_prefixes>, METH_VARARGS,
                            "Nanoseconds of the prefix cache's operations inside C++."},
                           {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace pykvcache::python

int pykvcache_add_allocator(PyObject* module) {
  using namespace pykvcache::python;
  allocator_type = add_type<AllocatorObject>(module, "pykvcache._C.Allocator", new_allocator,
                                             destroy_allocator, allocator_methods);
  if (allocator_type == nullptr || add_batch_type(module) != 0) return -1;
  return PyModule_AddFunctions(module, functions);
}
