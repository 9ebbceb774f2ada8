// pykvcache._C: the module object. Operators register themselves with torch when the library is
// loaded (csrc/cpu/*.cpp); what Python calls directly, the allocator, decode
// steps and the signature list, is added here.
#include <Python.h>

#include "allocator/binding.h"
#include "cpu/binding.h"
#include "cpu/isa.h"
#include "module_methods.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(pykvcache::cpu_isa_name()); }

PyMethodDef methods[] = {
    pykvcache::kListSignatures,
    pykvcache::kTakeBadArgument,
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set that the CPU kernels run with."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Compiled part of pykvcache.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* module = PyModule_Create(&module_def);
  if (module == nullptr) return nullptr;
  if (pykvcache_add_allocator(module) != 0 || pykvcache_add_cpu(module) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
