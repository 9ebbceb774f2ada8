// What the Python types of the extension have in common: objects, and methods whose C++ exceptions
// become Python ones.
#pragma once

#include <Python.h>

#include "python/values.h"

namespace pykvcache::python {

// Sets the Python error for the C++ exception in flight.
void raise_current();

// Runs `body`; nullptr and a Python error if it throws.
template <class F>
PyObject* guarded(F&& body) {
  try {
    return body();
  } catch (...) {
    raise_current();
    return nullptr;
  }
}

inline PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

using Args = PyObject* const*;

template <class Object, auto Function, int Arity>
PyObject* method(PyObject* self, Args args, Py_ssize_t count) {
  if (count != Arity) {
    return PyErr_Format(PyExc_TypeError, "takes %d arguments, got %zd", Arity, count);
  }
  return guarded([&] { return Function(*reinterpret_cast<Object*>(self), args); });
}

// A method of fixed arity: Function(object, args).
template <class Object, auto Function, int Arity>
PyMethodDef define(const char* name) {
  const auto function = method<Object, Function, Arity>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
          nullptr};
}

// Memory for an object, whose C++ members are not constructed yet.
template <class Object>
Object* allocate_object(PyTypeObject* type) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  return reinterpret_cast<Object*>(checked(allocate(type, 0)));
}

inline void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// Creates a heap type and adds it to the module; nullptr and a Python error if that fails.
template <class Object>
PyTypeObject* add_type(PyObject* module, const char* name, newfunc create, destructor destroy,
                       PyMethodDef* methods) {
  PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  PyType_Spec spec = {name, sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};
  auto* type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (type == nullptr || PyModule_AddType(module, type) != 0) return nullptr;
  return type;
}

}  // namespace pykvcache::python
