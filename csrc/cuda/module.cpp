// pykvcache._C_cuda: the module object. Operators register themselves with torch when the library
// is loaded (attention.cu, cache_ops.cu).
#include <Python.h>

#include "module_methods.h"

namespace {

PyMethodDef methods[] = {{"signatures", pykvcache::list_signatures, METH_NOARGS,
                          "C++ signature of every registered operator."},
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
