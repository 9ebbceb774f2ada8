// Rows of floats to float8: what write_kv does with float8 caches.
#include "cpu/kernels.h"
#include "cpu/kernels/rows.h"

namespace pykvcache::KV_ISA {
namespace {

template <class T>
float largest_of(const T* from, int64_t n) {
  const auto size = [](Vec x) __attribute__((always_inline)) { return max(x, zero() - x); };
  Vec most = zero();  // max() takes the second of two if the first is NaN
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) most = max(size(load(from + i)), most);
  if (i < n) most = max(size(load_n(from + i, n - i)), most);
  return reduce_max(most);
}

}  // namespace

float largest(const void* from, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return largest_of(static_cast<const BFloat16*>(from), n);
    case DType::kFloat16:
      return largest_of(static_cast<const Float16*>(from), n);
    default:
      return largest_of(static_cast<const float*>(from), n);
  }
}

void to_float8(const void* from, DType dtype, int64_t n, float scale, const float* channels,
               uint8_t* to) {
  constexpr int64_t kPiece = 64;
  float values[kPiece];
  for (int64_t done = 0; done < n; done += kPiece) {
    const int64_t count = min_of(kPiece, n - done);
    const char* piece = static_cast<const char*>(from) + done * element_size(dtype);
    convert_row(piece, dtype, {}, count, values);
    for (int64_t i = 0; i < count; ++i) values[i] /= channels ? channels[done + i] : scale;
    for (int64_t i = 0; i < count; ++i) to[done + i] = float_to_float8(values[i]);
  }
}

}  // namespace pykvcache::KV_ISA
