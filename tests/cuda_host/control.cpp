// What tests ask of the emulation: what device it is, and what it has counted.
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

extern "C" __attribute__((visibility("default"))) void kv_emulation_set_ctas(int count) {
  pykvcache::cuda::emulated_ctas() = count;
}
extern "C" __attribute__((visibility("default"))) void kv_emulation_set_shared_bytes(int bytes) {
  pykvcache::cuda::emulated_shared_bytes() = bytes;
}
extern "C" __attribute__((visibility("default"))) void kv_emulation_set_processors(int count) {
  pykvcache::cuda::emulated_processors() = count;
}
extern "C" __attribute__((visibility("default"))) uint64_t kv_emulation_bank_conflicts() {
  return cuda_host::counts().bank_conflicts;
}
extern "C" __attribute__((visibility("default"))) uint64_t kv_emulation_matrix_products() {
  return cuda_host::counts().matrix_products;
}
extern "C" __attribute__((visibility("default"))) uint64_t kv_emulation_warpgroup_products() {
  return cuda_host::counts().warpgroup_products;
}
extern "C" __attribute__((visibility("default"))) void kv_emulation_set_late_boxes(bool late) {
  cuda_host::boxes_are_late() = late;
}
#ifdef KV_HOST_PTX
extern "C" __attribute__((visibility("default"))) void kv_emulation_set_launcher(
    cuda_host::Launcher launcher) {
  cuda_host::launcher() = launcher;
}
#endif
