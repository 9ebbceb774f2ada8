// What the modules _C and _C_cuda both offer to Python.
#pragma once
#include <Python.h>

#include "registration.h"

namespace pykvcache {

// A list of str: the C++ signature of every operator that the library has registered.
inline PyObject* list_signatures(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  for (const std::string& text : signatures()) {
    PyObject* item = PyUnicode_FromString(text.c_str());
    const bool added = item != nullptr && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    if (added) continue;
    Py_DECREF(list);
    return nullptr;
  }
  return list;
}

}  // namespace pykvcache
