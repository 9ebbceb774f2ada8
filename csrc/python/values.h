// Values across the limited Python API, which has no buffer protocol in 3.10: integers arrive as
// bytes of int64 (ndarray.tobytes()), a list, a tuple or one int for all rows, and leave as
// bytearrays.
#pragma once

#include <Python.h>

#include <cstring>
#include <span>
#include <utility>
#include <vector>

namespace pykvcache::python {

// A Python error is set already.
struct ErrorIsSet {};

template <class T>
T* checked(T* object) {
  if (object == nullptr) throw ErrorIsSet{};
  return object;
}

// Owns one reference.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(checked(object)) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

  // For a dict; takes `value` over.
  void set(const char* key, PyObject* value) {
    const Owned owned(value);
    if (PyDict_SetItemString(object_, key, value) != 0) throw ErrorIsSet{};
  }

 private:
  PyObject* object_;
};

inline int64_t to_int(const char* name, PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value != -1 || !PyErr_Occurred()) return value;
  const bool is_integer = PyErr_ExceptionMatches(PyExc_OverflowError);
  PyErr_Clear();
  PyErr_Format(is_integer ? PyExc_ValueError : PyExc_TypeError,
               is_integer ? "%s must fit 64 bits, got %R" : "%s must be integers, got %R", name,
               object);
  throw ErrorIsSet{};
}

class IntArgument {
 public:
  IntArgument(const char* name, PyObject* object, size_t rows_of_scalar = 1) {
    if (PyBytes_Check(object)) {
      char* bytes;
      Py_ssize_t size;
      if (PyBytes_AsStringAndSize(object, &bytes, &size) != 0) throw ErrorIsSet{};
      data_ = {reinterpret_cast<const int64_t*>(bytes), size / sizeof(int64_t)};
      return;
    }
    if (PyList_Check(object)) {
      append_items(name, object, PyList_Size(object), PyList_GetItem);
    } else if (PyTuple_Check(object)) {
      append_items(name, object, PyTuple_Size(object), PyTuple_GetItem);
    } else {
      storage_.assign(rows_of_scalar, to_int(name, object));
    }
    data_ = storage_;
  }
  IntArgument(const IntArgument&) = delete;

  operator std::span<const int64_t>() const { return data_; }
  size_t size() const { return data_.size(); }
  int64_t operator[](size_t i) const { return data_[i]; }

 private:
  void append_items(const char* name, PyObject* items, Py_ssize_t size,
                    PyObject* (*get)(PyObject*, Py_ssize_t)) {
    storage_.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i) storage_.push_back(to_int(name, checked(get(items, i))));
  }

  std::vector<int64_t> storage_;
  std::span<const int64_t> data_;
};

// A bytearray of `size` elements, to fill before it is released.
template <class T>
class ArrayResult : public Owned {
 public:
  explicit ArrayResult(size_t size)
      : Owned(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size * sizeof(T)))) {}
  explicit ArrayResult(const std::vector<T>& values) : ArrayResult(values.size()) {
    if (!values.empty()) std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }

  T* data() { return reinterpret_cast<T*>(PyByteArray_AsString(get())); }
};

// While alive, other Python threads run.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace pykvcache::python
