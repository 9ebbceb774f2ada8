// The named PTX helpers of csrc/cuda/ptx.cuh as host C++.
//
// cp.async is modelled as late as it may be: bytes arrive when the thread waits for their group, so
// that a missing wait reads what was there before. ldmatrix counts bank conflicts.
#pragma once

#include "cpu/numeric.h"
#include "cuda_host/cuda_host.h"

#define KV_OMITTABLE(name, ...) \
  if (!::cuda_host::is_omitted(#name)) __VA_ARGS__

namespace pykvcache::cuda {

inline unsigned char* dynamic_shared() { return ::cuda_host::current->shared; }

// ---- numbers

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return float16_to_float(x.bits); }
inline float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }
inline float to_float(Float8 x) { return float8_to_float(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  return {float_to_float16(x)};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {float_to_bfloat16(x)};
}
template <>
inline Float8 from_float<Float8>(float x) {
  return {float_to_float8(x)};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

inline uint32_t unpack_float8(uint32_t pair) {
  return pack<Half>(float8_to_float(pair & 0xff), float8_to_float(pair >> 8 & 0xff));
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <class T>
T load_now(const T* from) {
  return *from;
}

inline float exp2_fast(float x) { return std::exp2(x); }

// ---- cp.async

inline void copy_async(void* to, const void* from, int bytes, bool real) {
  ::cuda_host::current->open_copies.push_back({to, real ? from : nullptr, bytes});
}
inline void copy_async_16(void* to, const void* from, uint32_t real) {
  if ((reinterpret_cast<uintptr_t>(to) | (real ? reinterpret_cast<uintptr_t>(from) : 0)) % 16)
    ::cuda_host::stop("cp.async of 16 bytes at an address that is not aligned to 16");
  copy_async(to, from, 16, real != 0);
}
inline void copy_async_4(void* to, const void* from, bool real) { copy_async(to, from, 4, real); }

inline void copy_commit() {
  auto* self = ::cuda_host::current;
  self->copy_groups.push_back(std::move(self->open_copies));
  self->open_copies.clear();
}

template <int kPending>
void copy_wait() {
  auto* self = ::cuda_host::current;
  while (self->copy_groups.size() > kPending) {
    for (const auto& copy : self->copy_groups.front()) {
      if (copy.from == nullptr)
        std::memset(copy.to, 0, copy.bytes);
      else
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    self->copy_groups.pop_front();
  }
}

// ---- matrices

namespace host {

struct RowOfMatrix {
  uint16_t element[8];
  uintptr_t address;
};

inline void count_bank_conflicts(const uintptr_t (&addresses)[8]) {
  unsigned used = 0;
  for (const uintptr_t address : addresses) {
    const unsigned bank = 1u << (address / 16 % 8);
    if (used & bank) ++::cuda_host::counts().bank_conflicts;
    used |= bank;
  }
}

template <bool kTransposed>
void load_matrices(const void* row, uint32_t (&to)[4]) {
  RowOfMatrix mine;
  std::memcpy(mine.element, row, 16);  // in this lane: what it may not see yet must show
  mine.address = reinterpret_cast<uintptr_t>(row);
  struct Result {
    uint32_t words[4];
  };
  const Result result = ::cuda_host::collective<Result>(mine, [](auto&& in, auto&& out) {
    for (int m = 0; m < 4; ++m) {
      uintptr_t addresses[8];
      for (int i = 0; i < 8; ++i) addresses[i] = in(m * 8 + i).address;
      count_bank_conflicts(addresses);
      for (int lane = 0; lane < 32; ++lane) {
        const int line = lane / 4, pair = 2 * (lane % 4);
        const uint32_t low =
            kTransposed ? in(m * 8 + pair).element[line] : in(m * 8 + line).element[pair];
        const uint32_t high =
            kTransposed ? in(m * 8 + pair + 1).element[line] : in(m * 8 + line).element[pair + 1];
        out(lane).words[m] = low | high << 16;
      }
    }
  });
  std::memcpy(to, result.words, 16);
}

template <class T>
float element(uint32_t word, int index) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * index)});
}

}  // namespace host

inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  host::load_matrices<false>(row, to);
}
inline void load_matrices_transposed(const void* row, uint32_t (&to)[4]) {
  host::load_matrices<true>(row, to);
}

// Fragment layouts of PTX ISA 9.0, "Matrix fragments for mma.m16n8k16 with floating point type".
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  struct Products {
    float c[4];
  };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Products products = ::cuda_host::collective<Products>(mine, [](auto&& in, auto&& out) {
    ++::cuda_host::counts().matrix_products;
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Operands& x = in(lane);
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i)
          left[g + r % 2 * 8][2 * t + i + r / 2 * 8] = host::element<T>(x.a[r], i);
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < 2; ++i) right[2 * t + i + r * 8][g] = host::element<T>(x.b[r], i);
    }
    float sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column)
          sums[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r)
        out(lane).c[r] = sums[lane / 4 + r / 2 * 8][2 * (lane % 4) + r % 2];
  });
  for (int r = 0; r < 4; ++r) c[r] += products.c[r];
}

}  // namespace pykvcache::cuda
