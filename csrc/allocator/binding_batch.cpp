// The Python type Batch.
#include "allocator/batch.h"
#include "allocator/binding_types.h"

namespace pykvcache::python {
namespace {

struct BatchObject {
  PyObject base;
  std::shared_ptr<Shared> shared;
  Batch batch;
  struct {
    int64_t tokens, columns;
  } needs;
};

PyObject* new_batch(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&] {
    PyObject* owner;
    if (!PyArg_ParseTuple(args, "O!", allocator_type, &owner)) throw ErrorIsSet{};
    const auto& shared = reinterpret_cast<AllocatorObject*>(owner)->shared;
    auto* self = allocate_object<BatchObject>(type);
    new (&self->shared) std::shared_ptr<Shared>(shared);
    new (&self->batch) Batch(shared->allocator.groups());
    return reinterpret_cast<PyObject*>(self);
  });
}

void destroy_batch(PyObject* self) {
  reinterpret_cast<BatchObject*>(self)->batch.~Batch();
  reinterpret_cast<BatchObject*>(self)->shared.~shared_ptr();
  free_object(self);
}

PyObject* bind(BatchObject& self, Args args) {
  self.batch.bind(IntArgument("seqs", args[0]));
  return none();
}

// (tables, slots, seq_lens, cu_seqlens_q, columns, tokens): addresses, and capacities.
PyObject* set_arrays(BatchObject& self, Args args) {
  const IntArgument tables("tables", args[0]), slots("slots", args[1]);
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  BatchArrays arrays;
  for (size_t group = 0; group < tables.size(); ++group) {
    arrays.block_tables.push_back(static_cast<int32_t*>(pointer(tables[group])));
    arrays.slot_mappings.push_back(static_cast<int64_t*>(pointer(slots[group])));
  }
  arrays.seq_lens = static_cast<int32_t*>(pointer(to_int("seq_lens", args[2])));
  arrays.cu_seqlens_q = static_cast<int32_t*>(pointer(to_int("cu_seqlens_q", args[3])));
  arrays.columns = to_int("columns", args[4]);
  arrays.tokens = to_int("tokens", args[5]);
  self.batch.set_arrays(arrays);
  return none();
}

PyObject* set_reach(BatchObject& self, Args args) {
  const IntArgument windows("windows", args[0]), chunks("chunks", args[1]);
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
  const IntArgument counts("counts", args[0], self.batch.rows());
  const int64_t width = to_int("width", args[1]);
  const bool release = to_int("release", args[2]) != 0;
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

PyMethodDef batch_methods[] = {define<BatchObject, bind, 1>("bind"),
                               define<BatchObject, set_arrays, 6>("set_arrays"),
                               define<BatchObject, set_reach, 2>("set_reach"),
                               define<BatchObject, step, 3>("step"),
                               define<BatchObject, needs, 0>("needs"),
                               {nullptr, nullptr, 0, nullptr}};

}  // namespace

int add_batch_type(PyObject* module) {
  const char* name = "pykvcache._C.Batch";
  return add_type<BatchObject>(module, name, new_batch, destroy_batch, batch_methods) ? 0 : -1;
}

}  // namespace pykvcache::python
