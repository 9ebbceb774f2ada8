// Everything of the machine that C++ has no word for: conversions, asynchronous copies, matrix
// fragments. Kernels see PTX only through these names. With KV_CUDA_HOST the same names come from
// tests/cuda_host/ptx_host.h, which runs the kernels without a GPU.
//
// Fragments of multiply_add (m16n8k16; g = lane / 4, t = lane % 4):
//   a [16, 16]  4 words of 2: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8
//   b [16, 8]   2 words of 2: rows 2t and 2t + 8, column g
//   c [16, 8]   4 floats:     row g columns 2t, 2t + 1, then row g + 8
#pragma once

#include <cstdint>

#ifdef KV_CUDA_HOST
#include "cuda_host/ptx_host.h"
#else
// A barrier or wait that tests of the emulation leave out, to see that its absence shows.
#define KV_OMITTABLE(name, ...) __VA_ARGS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace pykvcache::cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

// ---- numbers: bits in memory, float in registers

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {  // e4m3, largest 448, no infinity
  uint8_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float8 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

template <class T>
__device__ T from_float(float x);  // rounds to nearest even; Float8 saturates
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
  return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}

// Two numbers in a word, the first in its low half.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// The two Float8 in the low half of a word as two Half: exact.
__device__ __forceinline__ uint32_t unpack_float8(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  const __half2 both(
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
  return reinterpret_cast<const uint32_t&>(both);
#else
  // The same bits in a half's fields are 2^8 times too small: the biases are 7 and 15. What is NaN
  // would then be 480.
  const uint32_t high = byte_permute(pair, 0, 0x1404);
  const uint32_t bits = (high & 0x80008000u) | (high & 0x7f007f00u) >> 1;
  const __half2 value = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f));
  return reinterpret_cast<const uint32_t&>(value) |
         __heq2_mask(__habs2(value), __float2half2_rn(480.0f));
#endif
}

// A load that is issued where it stands: the compiler moves plain ones to where they are used, and
// each of a few would wait for the one before it.
__device__ __forceinline__ float4 load_now(const float4* from) {
  float4 x;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ float2 load_now(const float2* from) {
  float2 x;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- asynchronous copies from global to shared memory; real == 0 writes zeros and reads nothing

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy_async_16(void* to, const void* from, uint32_t real) {
  asm volatile(
      "{.reg .pred absent; setp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;}" ::"r"(shared_address(to)),
      "l"(from), "r"(real)
      : "memory");
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real ? 4 : 0)
               : "memory");
}
// Ends a group of this thread's copies; copy_wait<n> waits for all groups but the last n.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices

// Four 8x8 matrices of 2-byte elements; lane i names row i % 8 (16 bytes) of matrix i / 8. Word m
// holds elements 2t and 2t + 1 of row g of matrix m, or of its transpose.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b in float.
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define KV_MULTIPLY_ADD(T, type)                                                         \
  template <>                                                                            \
  __device__ __forceinline__ void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], \
                                                  uint32_t b0, uint32_t b1) {            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                           \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                 \
  }
KV_MULTIPLY_ADD(Half, "f16")
KV_MULTIPLY_ADD(BFloat16, "bf16")
#undef KV_MULTIPLY_ADD

}  // namespace pykvcache::cuda
#endif
