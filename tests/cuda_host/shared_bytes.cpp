// Prints the dynamic shared memory of every attention kernel: name<types>, class of dims, bytes.
#include <cstdio>

#include "cuda/decode.cuh"
#include "cuda/plain.cuh"
#include "cuda/prefill.cuh"
#include "cuda/wgmma_prefill.cuh"

using namespace pykvcache::cuda;

template <class T, class KV, int kDim, int kStages>
void print_decode(const char* types) {
  std::printf("decode_kernel<%s, %d> %d %d\n", types, kStages, kDim,
              Decode<T, KV, kDim, kStages>::kSharedBytes);
}

template <class T, class KV, int kDim>
void print(const char* types) {
  print_decode<T, KV, kDim, kUsualStages<KV>>(types);
  if (kDim == 256 && sizeof(KV) == 2) print_decode<T, KV, kDim, 2>(types);
  std::printf("prefill_kernel<%s> %d %d\n", types, kDim, Prefill<T, KV, kDim>::kSharedBytes);
}

template <class T, int kDim>
void print_wgmma(const char* type) {
  std::printf("wgmma_kernel<%s> %d %d\n", type, kDim, WarpgroupPrefill<T, kDim>::kSharedBytes);
}

template <int kDim>
void print_all() {
  print_wgmma<Half, kDim>("Half");
  print_wgmma<BFloat16, kDim>("BFloat16");
  print<Half, Half, kDim>("Half, Half");
  print<Half, Float8, kDim>("Half, Float8");
  print<BFloat16, BFloat16, kDim>("BFloat16, BFloat16");
}

int main() {
  print_all<64>();
  print_all<128>();
  print_all<256>();
  std::printf("plain_kernel 0 %d\n", Plain<float>::kSharedBytes);
}
