// Checks of tensor arguments with messages that name the argument, the dimension and the numbers.
// A Dim is bound by the first tensor that mentions it; every later tensor must agree.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "params.h"

namespace pykvcache {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline void append_part(std::string& text, const char* part) { text.append(part); }
inline void append_part(std::string& text, const std::string& part) { text.append(part); }
inline void append_part(std::string& text, int64_t part) { text.append(std::to_string(part)); }

// Raised to Python as ValueError with the parts joined (STD_TORCH_CHECK would prefix file and
// line).
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append_part(text, parts), ...);
  throw std::invalid_argument(text);
}

class Dim {
 public:
  explicit Dim(const char* name) : name_(name) {}
  Dim(const char* name, int64_t size) : name_(name), size_(size) {}
  operator int64_t() const { return size_; }
  const char* name() const { return name_; }
  bool accepts(int64_t size) {
    if (size_ < 0) size_ = size;
    return size_ == size;
  }

 private:
  const char* name_;
  int64_t size_ = -1;
};

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i)
    text.append(i ? ", " : "").append(std::to_string(t.size(i)));
  return text.append("]");
}

inline std::string names_of(std::initializer_list<Dim*> dims) {
  std::string text = "[";
  for (Dim* dim : dims) text.append(text.size() > 1 ? ", " : "").append(dim->name());
  return text.append("]");
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<Dim*> dims) {
  if (t.dim() != static_cast<int64_t>(dims.size()))
    fail(name, " must be ", names_of(dims), ", got shape ", shape_of(t));
  int64_t i = 0;
  for (Dim* dim : dims) {
    const int64_t size = t.size(i++);
    const int64_t bound = *dim;
    if (!dim->accepts(size))
      fail(name, " must be ", names_of(dims), ": ", dim->name(), " is ", bound, " but got ", size);
  }
}

inline void check_last_dim_contiguous(const Tensor& t, const char* name) {
  if (t.dim() > 0 && t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1)
    fail(name, " must be contiguous in its last dimension, got stride ", t.stride(t.dim() - 1));
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType wanted) {
  if (t.scalar_type() != wanted)
    fail(name, " must be ", dtype_name(wanted), ", got ", dtype_name(t.scalar_type()));
}

inline void check_float(const Tensor& t, const char* name) {
  for (const ScalarType wanted : {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16})
    if (t.scalar_type() == wanted) return;
  fail(name, " must be float32, float16 or bfloat16, got ", dtype_name(t.scalar_type()));
}

// Where a backend wants its tensors.
struct Place {
  const char* backend;
  int32_t device = -1;       // index of a CUDA device, or -1 for the CPU
  bool reads_values = true;  // lengths and block ids can be looked at without waiting for a GPU
};

inline void check_place(const Tensor& t, const char* name, const Place& place) {
  if (place.device < 0 && !t.is_cpu())
    fail(name, " must be on the CPU for backend '", place.backend, "'");
  if (place.device >= 0 && !(t.is_cuda() && t.get_device_index() == place.device))
    fail(name, " must be on cuda:", place.device, " as the caches are, for backend '",
         place.backend, "'");
}

inline DType to_dtype(const Tensor& t, const char* name,
                      const char* wanted = "float32, float16 or bfloat16") {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      fail(name, " must be ", wanted, ", got ", dtype_name(t.scalar_type()));
  }
}

}  // namespace pykvcache
