// Registers stable-ABI kernels and remembers their C++ signatures, so that Python can compare them
// with the schema table at import. A boxed kernel trusts its schema blindly: without this check an
// edited schema would hand the kernel shifted arguments and return garbage.
//
// Kernels throw std::invalid_argument for bad arguments, which has to be ValueError in Python.
// torch makes it one before 2.15 and RuntimeError since, so its text is kept for
// pykvcache/operators.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace pykvcache {

using torch::stable::Tensor;

template <class T>
struct SchemaWord;
template <>
struct SchemaWord<Tensor> {
  static std::string text() { return "Tensor"; }
};
template <>
struct SchemaWord<double> {
  static std::string text() { return "float"; }
};
template <>
struct SchemaWord<int64_t> {
  static std::string text() { return "int"; }
};
template <>
struct SchemaWord<bool> {
  static std::string text() { return "bool"; }
};
template <>
struct SchemaWord<void> {
  static std::string text() { return ""; }
};
template <class T>
struct SchemaWord<std::optional<T>> {
  static std::string text() { return SchemaWord<T>::text() + "?"; }
};
template <class T>
struct SchemaWord<std::vector<T>> {
  static std::string text() { return SchemaWord<T>::text() + "[]"; }
};
template <class... T>
struct SchemaWord<std::tuple<T...>> {
  static std::string text() {
    std::string joined;
    ((joined += (joined.empty() ? "" : ",") + SchemaWord<T>::text()), ...);
    return joined;
  }
};

template <class R, class... Args>
std::string schema_types(R (*)(Args...)) {
  using Decayed = std::tuple<std::remove_cv_t<std::remove_reference_t<Args>>...>;
  return "(" + SchemaWord<Decayed>::text() + ")->(" + SchemaWord<R>::text() + ")";
}

// "name(types)->(types)" of every kernel registered so far.
inline std::vector<std::string>& signatures() {
  static std::vector<std::string> all;
  return all;
}

// What the newest bad argument of this thread was.
inline std::string& bad_argument() {
  thread_local std::string text;
  return text;
}

// A kernel that leaves a note of its bad argument.
template <auto Kernel>
struct Noting;
template <class R, class... Args, R (*Kernel)(Args...)>
struct Noting<Kernel> {
  static R call(Args... args) {
    try {
      return Kernel(std::forward<Args>(args)...);
    } catch (const std::invalid_argument& error) {
      bad_argument() = error.what();
      throw;
    }
  }
};

}  // namespace pykvcache

#define KV_IMPL(m, name, fn)                                                    \
  do {                                                                          \
    (m).impl(name, TORCH_BOX(&::pykvcache::Noting<&fn>::call));                 \
    ::pykvcache::signatures().push_back(name + ::pykvcache::schema_types(&fn)); \
  } while (false)
