// The Python type LayerStep, which gets addresses and strides and checks nothing but what the rows
// say, and functions about memory and launches.
#include "cpu/binding.h"

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launches.h"
#include "cpu/layer_step.h"
#include "cpu/linear.h"
#include "cpu/pages.h"
#include "cpu/probe.h"
#include "python/types.h"

namespace pykvcache::python {
namespace {

struct LayerStepObject {
  PyObject base;
  LayerStep step;
};

template <class T>
T* to_pointer(PyObject* object) {
  return reinterpret_cast<T*>(to_int("address", object));
}

double to_double(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw ErrorIsSet{};
  return value;
}

DType to_dtype(PyObject* object) {
  const int64_t dtype = to_int("dtype", object);
  if (dtype < 0 || dtype > static_cast<int64_t>(DType::kBFloat16))
    throw std::invalid_argument("dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<DType>(dtype);
}

PyObject* new_layer_step(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&] {
    int deterministic;
    if (!PyArg_ParseTuple(args, "p", &deterministic)) throw ErrorIsSet{};
    auto* self = allocate_object<LayerStepObject>(type);
    new (&self->step) LayerStep(deterministic != 0);
    return reinterpret_cast<PyObject*>(self);
  });
}

// (k, v, dtype, block_size): each side as (address, num_blocks, HKV, D, strides of block, head and
// slot).
PyObject* set_caches(LayerStepObject& self, Args args) {
  const DType dtype = to_dtype(args[2]);
  const auto view = [&](const IntArgument& side) {
    if (side.size() != 7) throw std::invalid_argument("a cache is 7 integers");
    CacheView cache;
    cache.data = reinterpret_cast<void*>(side[0]);
    cache.dtype = dtype;
    cache.num_blocks = side[1];
    cache.head_dim = side[3];
    cache.stride_block = side[4];
    cache.stride_head = side[5];
    cache.stride_slot = side[6];
    return cache;
  };
  const IntArgument k("k", args[0]), v("v", args[1]);
  self.step.set_caches(view(k), view(v), k[2], to_int("block_size", args[3]));
  return none();
}

// (block_table, columns, seq_lens, cu_seqlens_q, slot_mapping, rows)
PyObject* set_batch(LayerStepObject& self, Args args) {
  self.step.set_batch(to_pointer<int32_t>(args[0]), to_int("columns", args[1]),
                      to_pointer<int32_t>(args[2]), to_pointer<int32_t>(args[3]),
                      to_pointer<int64_t>(args[4]), to_int("rows", args[5]));
  return none();
}

// (k, stride_row, stride_head, v, stride_row, stride_head)
PyObject* write(LayerStepObject& self, Args args) {
  const auto tokens = [&](int first) {
    return TokenView{to_pointer<void>(args[first]), self.step.dtype(),
                     to_int("stride", args[first + 1]), to_int("stride", args[first + 2])};
  };
  const TokenView k = tokens(0), v = tokens(3);
  self.step.write(k, v);
  return none();
}

// (q, stride_row, stride_head, heads, scale, softcap, window, chunk, sinks, out)
PyObject* attend(LayerStepObject& self, Args args) {
  const LayerStep::Query query{to_pointer<void>(args[0]),  to_int("stride", args[1]),
                               to_int("stride", args[2]),  to_int("heads", args[3]),
                               to_double(args[4]),         to_double(args[5]),
                               to_int("window", args[6]),  to_int("chunk", args[7]),
                               to_pointer<float>(args[8]), to_pointer<void>(args[9])};
  {
    const WithoutGil released;
    self.step.attend(query);
  }
  return none();
}

void destroy_layer_step(PyObject* self) {
  reinterpret_cast<LayerStepObject*>(self)->step.~LayerStep();
  free_object(self);
}

PyMethodDef methods[] = {define<LayerStepObject, set_caches, 4>("set_caches"),
                         define<LayerStepObject, set_batch, 6>("set_batch"),
                         define<LayerStepObject, write, 6>("write"),
                         define<LayerStepObject, attend, 10>("attend"),
                         {nullptr, nullptr, 0, nullptr}};

// (address, bytes) -> whether the system listened
PyObject* advise_huge_pages(PyObject*, PyObject* args) {
  return guarded([&] {
    long long address, bytes;
    if (!PyArg_ParseTuple(args, "LL", &address, &bytes)) throw ErrorIsSet{};
    return PyBool_FromLong(prefer_huge_pages(address, bytes));
  });
}

// (addresses, bytes of each) -> sum
PyObject* read_memory(PyObject*, PyObject* args) {
  return guarded([&] {
    PyObject* addresses;
    long long bytes;
    if (!PyArg_ParseTuple(args, "OL", &addresses, &bytes)) throw ErrorIsSet{};
    const IntArgument regions("addresses", addresses);
    float sum;
    {
      const WithoutGil released;
      sum = read_regions(regions, bytes);
    }
    return PyFloat_FromDouble(sum);
  });
}

PyObject* most_linear_rows(PyObject*, PyObject*) { return PyLong_FromLongLong(linear_rows()); }

// (x, weight, bias or 0, out, rows, inputs, outputs): addresses of contiguous bfloat16.
PyObject* run_linear(PyObject*, PyObject* args) {
  return guarded([&] {
    long long x, weight, bias, out, rows, inputs, outputs;
    if (!PyArg_ParseTuple(args, "LLLLLLL", &x, &weight, &bias, &out, &rows, &inputs, &outputs))
      throw ErrorIsSet{};
    const LinearParams p{reinterpret_cast<const void*>(x),
                         reinterpret_cast<const void*>(weight),
                         reinterpret_cast<const void*>(bias),
                         reinterpret_cast<void*>(out),
                         rows,
                         inputs,
                         outputs};
    {
      const WithoutGil released;
      linear(p);
    }
    return none();
  });
}

// Integers of LaunchEntry, entry after entry.
PyObject* replace_launches(PyObject*, PyObject* integers) {
  return guarded([&] {
    constexpr size_t kFields = sizeof(LaunchEntry) / sizeof(int64_t);
    const IntArgument fields("entries", integers);
    if (fields.size() % kFields != 0)
      throw std::invalid_argument("an entry is " + std::to_string(kFields) + " integers");
    std::vector<LaunchEntry> entries(fields.size() / kFields);
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto field = [&](size_t k) { return fields[i * kFields + k]; };
      entries[i] = {field(0), field(1), field(2),
                    field(3), field(4), {field(5), field(6), field(7), field(8)}};
      if (field(0) != LaunchEntry::kDecode && field(0) != LaunchEntry::kPrefill)
        throw std::invalid_argument("phase must be 0 (decode) or 1 (prefill)");
    }
    set_launches(std::move(entries));
    return none();
  });
}

// (dtype, HQ, HKV, D, block size, seq_lens, query_lens): how a call with these rows is launched.
PyObject* explain(PyObject*, PyObject* args) {
  return guarded([&] {
    PyObject *dtype, *seq_lens, *query_lens;
    long long heads, kv_heads, dim, block_size;
    if (!PyArg_ParseTuple(args, "OLLLLOO", &dtype, &heads, &kv_heads, &dim, &block_size, &seq_lens,
                          &query_lens))
      throw ErrorIsSet{};
    const IntArgument lengths("seq_lens", seq_lens), queries("query_lens", query_lens);
    if (lengths.size() != queries.size() || heads < 1 || kv_heads < 1 || heads % kv_heads != 0 ||
        dim < 1 || dim > kMaxHeadDim || block_size < 1)
      throw std::invalid_argument("no such call");
    const LaunchReport report =
        explain_launch(to_dtype(dtype), heads, kv_heads, dim, block_size, lengths, queries);
    Owned found(PyDict_New());
    const auto set = [&](const char* key, int64_t value) {
      found.set(key, PyLong_FromLongLong(value));
    };
    set("threads", report.threads);
    set("items", report.items);
    set("decode_items", report.decode_items);
    set("cut_rows", report.cut_rows);
    set("most_splits", report.most_splits);
    set("tile", report.tile);
    set("stages", report.stages);
    set("query_tile", report.query_tile);
    return found.release();
  });
}

PyMethodDef functions[] = {
    {"set_launches", replace_launches, METH_O, "Replace the launch table of the CPU kernels."},
    {"explain_launch", explain, METH_VARARGS, "How a call of paged_attention is launched."},
    {"linear", run_linear, METH_VARARGS, "A linear layer of few rows in bfloat16."},
    {"linear_rows", most_linear_rows, METH_NOARGS, "Most rows that linear takes; 0: none."},
    {"prefer_huge_pages", advise_huge_pages, METH_VARARGS,
     "Ask for huge pages in untouched memory."},
    {"read_regions", read_memory, METH_VARARGS, "Plain loads of memory regions, for measuring."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace pykvcache::python

int pykvcache_add_cpu(PyObject* module) {
  using namespace pykvcache::python;
  const char* name = "pykvcache._C.LayerStep";
  if (add_type<LayerStepObject>(module, name, new_layer_step, destroy_layer_step, methods) ==
      nullptr)
    return -1;
  return PyModule_AddFunctions(module, functions);
}
