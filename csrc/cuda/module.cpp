// pykvcache._C_cuda: the module object. Operators register themselves with torch when the library
// is loaded (attention.cu, cache_ops.cu).
#include <Python.h>

#include "cuda/explain.h"
#include "module_methods.h"
#include "python/types.h"

namespace {

using namespace pykvcache;
using namespace pykvcache::python;

DType to_dtype(long long number) {
  if (number < 0 || number > static_cast<long long>(DType::kFloat8E4M3))
    throw std::invalid_argument(
        "dtype must be 0 (float32), 1 (float16), 2 (bfloat16) or 3 (float8_e4m3fn)");
  return static_cast<DType>(number);
}

PyObject* to_dict(const cuda::LaunchReport& report) {
  Owned found(PyDict_New());
  const auto set = [&](const char* key, int64_t value) {
    found.set(key, PyLong_FromLongLong(value));
  };
  found.set("kernel", PyUnicode_FromString(report.kernel));
  set("rows", report.shape.rows);
  set("tile", report.shape.keys);
  set("stages", report.shape.stages);
  set("threads", report.shape.threads);
  set("ctas", report.ctas);
  set("cut_rows", report.cut_rows);
  set("most_splits", report.most_splits);
  return found.release();
}

// (dtype of q, of the cache, HQ, HKV, D, block size, seq_lens, query_lens): a dict for each
// attention kernel of a call with these rows.
PyObject* explain(PyObject*, PyObject* args) {
  return guarded([&] {
    PyObject *seq_lens, *query_lens;
    long long q, cache, heads, kv_heads, dim, block_size;
    if (!PyArg_ParseTuple(args, "LLLLLLOO", &q, &cache, &heads, &kv_heads, &dim, &block_size,
                          &seq_lens, &query_lens))
      throw ErrorIsSet{};
    const IntArgument lengths("seq_lens", seq_lens), queries("query_lens", query_lens);
    if (lengths.size() != queries.size() || kv_heads < 1 || heads < 1 || heads % kv_heads != 0 ||
        dim < 1 || dim > kMaxHeadDim || block_size < 1)
      throw std::invalid_argument("no such call");
    Owned list(PyList_New(0));
    for (const cuda::LaunchReport& report : cuda::explain_launch(
             to_dtype(q), to_dtype(cache), heads, kv_heads, dim, block_size, lengths, queries)) {
      const Owned entry(to_dict(report));
      if (PyList_Append(list.get(), entry.get()) != 0) throw ErrorIsSet{};
    }
    return list.release();
  });
}

PyMethodDef methods[] = {
    pykvcache::kListSignatures,
    pykvcache::kTakeBadArgument,
    {"explain_launch", explain, METH_VARARGS, "Which kernels a call of paged_attention launches."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                          "_C_cuda",
                          "CUDA part of pykvcache.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  return PyModule_Create(&module_def);
}
