// Hopper's own instructions (sm_90a) by name: barriers that count bytes, boxes copied by the tensor
// memory accelerator (TMA), products by a warpgroup (wgmma). With KV_CUDA_HOST the same names come
// from tests/cuda_host/hopper_host.h.
//
// A warpgroup is four warps from a multiple of four. Its products are asynchronous: registers and
// shared memory that they use belong to them until warpgroup_wait. Fragments of a warpgroup: warp w
// has rows 16w to 16w + 15, in ptx.cuh's layout of a and c; c[j] holds columns 8j to 8j + 7.
//
// Copies and products work in the async proxy: what threads wrote to shared memory themselves is
// ordered before them by async_proxy_fence only.
#pragma once

#include "cuda/ptx.cuh"

namespace pykvcache::cuda {

constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64;   // rows of a product
constexpr int kBoxColumns = 64;  // 2-byte columns of a box: the 128 bytes of a swizzled row

// Blocks of a cache as boxes are cut from it: [num_blocks, HKV, block_size, D].
struct BoxLayout {
  const void* data;
  int64_t sizes[4];         // D, block_size, HKV, num_blocks
  int64_t stride_bytes[3];  // of a slot, head, block
  int32_t box_rows;         // slots of a box
};

}  // namespace pykvcache::cuda

#ifdef KV_CUDA_HOST
#include "cuda_host/hopper_host.h"
#else
#include <cuda.h>  // the type of a tensor map; nothing of libcuda is linked

namespace pykvcache::cuda {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// ---- barriers: a phase ends when all its arrivals have come and all expected bytes have landed

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// By the thread that initialised barriers, before the CTA's barrier that lets others use them.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended; at once if that was the phase before the current one.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Barrier `id` (1 to 15) of `threads` threads, of which some only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- boxes

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// By one thread: box_rows slots from (block, head, slot), kBoxColumns dims from `dim`, to rows of
// 128 bytes in 128-byte swizzle. What lies outside of the cache is zeros (block -1: all of it), and
// counts as bytes that landed.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, Barrier* barrier,
                                         int32_t dim, int32_t slot, int32_t head, int32_t block) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(map), "r"(dim), "r"(slot), "r"(head), "r"(block), "r"(shared_address(barrier))
      : "memory");
}

// ---- registers of a warpgroup: given up by one, taken by others

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products

// The compiler must have written these registers before this line, and read them after it.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// Before the first product of registers that were touched otherwise.
template <class... Registers>
__device__ __forceinline__ void warpgroup_fence(Registers&... registers) {
  (pin_registers(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products; warpgroup_wait<n> waits for all groups but the last n, which leaves
// `registers` to this thread again.
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending, class... Registers>
__device__ __forceinline__ void warpgroup_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin_registers(registers), ...);
}

// c = a b^T, or c += a b^T: a [64, 16] and b [N, 16] in shared memory, 16 contiguous.
template <class T, int kCount>
__device__ void multiply_shared(float (&c)[kCount][4], uint64_t a, uint64_t b, bool accumulate);
// c += a b: a [64, 16] in registers, b [16, N] in shared memory, N contiguous.
template <class T, int kCount>
__device__ void multiply_registers(float (&c)[kCount][4], const uint32_t (&a)[4], uint64_t b);

#define KV_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define KV_THIRTY KV_TEN() KV_TEN(1) KV_TEN(2)
#define KV_SIXTY KV_THIRTY KV_TEN(3) KV_TEN(4) KV_TEN(5)
#define KV_NINETY KV_SIXTY KV_TEN(6) KV_TEN(7) KV_TEN(8)
#define KV_HUNDRED_TWENTY KV_NINETY KV_TEN(9) KV_TEN(10) KV_TEN(11)
#define KV_NAMES_32 KV_THIRTY "%30,%31"
#define KV_NAMES_64 KV_SIXTY "%60,%61,%62,%63"
#define KV_NAMES_128 KV_HUNDRED_TWENTY "%120,%121,%122,%123,%124,%125,%126,%127"
#define KV_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define KV_C16(j) KV_C4(j), KV_C4(j + 1), KV_C4(j + 2), KV_C4(j + 3)
#define KV_C32 KV_C16(0), KV_C16(4)
#define KV_C64 KV_C32, KV_C16(8), KV_C16(12)
#define KV_C128 KV_C64, KV_C16(16), KV_C16(20), KV_C16(24), KV_C16(28)

// n: columns of c; half: registers of c; i0 to i4: numbers of the operands after them.
#define KV_PRODUCTS(T, type, n, half, i0, i1, i2, i3, i4)                                     \
  template <>                                                                                 \
  __device__ __forceinline__ void multiply_shared<T, n / 8>(float (&c)[n / 8][4], uint64_t a, \
                                                            uint64_t b, bool accumulate) {    \
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" #i2                                       \
                 ", 0;\n"                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type              \
                 " {" KV_NAMES_##half "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;}"                \
                 : KV_C##half                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                          \
                 : "memory");                                                                 \
  }                                                                                           \
  template <>                                                                                 \
  __device__ __forceinline__ void multiply_registers<T, n / 8>(                               \
      float (&c)[n / 8][4], const uint32_t (&a)[4], uint64_t b) {                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type              \
                 " {" KV_NAMES_##half "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4    \
                                      ", 1, 1, 1, 1;"                                         \
                 : KV_C##half                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                         \
                 : "memory");                                                                 \
  }
#define KV_PRODUCTS_OF(T, type)                     \
  KV_PRODUCTS(T, type, 64, 32, 32, 33, 34, 35, 36)  \
  KV_PRODUCTS(T, type, 128, 64, 64, 65, 66, 67, 68) \
  KV_PRODUCTS(T, type, 256, 128, 128, 129, 130, 131, 132)
KV_PRODUCTS_OF(Half, "f16")
KV_PRODUCTS_OF(BFloat16, "bf16")
#undef KV_PRODUCTS_OF
#undef KV_PRODUCTS
#undef KV_C128
#undef KV_C64
#undef KV_C32
#undef KV_C16
#undef KV_C4
#undef KV_NAMES_128
#undef KV_NAMES_64
#undef KV_NAMES_32
#undef KV_HUNDRED_TWENTY
#undef KV_NINETY
#undef KV_SIXTY
#undef KV_THIRTY
#undef KV_TEN

}  // namespace pykvcache::cuda
#endif
