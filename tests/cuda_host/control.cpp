// What tests ask of the emulation: how many CTAs run at once, and what it has counted.
#include "cuda/launch.cuh"
#include "cuda_host/ptx_host.h"

extern "C" __attribute__((visibility("default"))) void kv_emulation_set_ctas(int count) {
  pykvcache::cuda::emulated_ctas() = count;
}
extern "C" __attribute__((visibility("default"))) uint64_t kv_emulation_bank_conflicts() {
  return cuda_host::counts().bank_conflicts;
}
extern "C" __attribute__((visibility("default"))) uint64_t kv_emulation_matrix_products() {
  return cuda_host::counts().matrix_products;
}
