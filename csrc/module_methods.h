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

// A str: what the newest bad argument of an operator in this thread was; "" if that was asked for.
inline PyObject* take_bad_argument(PyObject*, PyObject*) {
  PyObject* text = PyUnicode_FromString(bad_argument().c_str());
  bad_argument().clear();
  return text;
}

// What both modules offer, to be put among their methods.
inline constexpr PyMethodDef kListSignatures = {"signatures", list_signatures, METH_NOARGS,
                                                "C++ signature of every registered operator."};
inline constexpr PyMethodDef kTakeBadArgument = {
    "take_bad_argument", take_bad_argument, METH_NOARGS,
    "What the newest bad argument of an operator in this thread was; '' if it was taken."};

}  // namespace pykvcache
