// Launching kernels and asking for the device's size, on a GPU or in the emulation of
// tests/cuda_host. No torch header here.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef KV_CUDA_HOST
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace pykvcache::cuda {

#ifdef KV_CUDA_HOST

using Stream = void*;

// CTAs that run at once: few, so that a test's short sequences are cut over all of them.
inline int& emulated_ctas() {
  static int count = 8;
  return count;
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream,
            const Params& params) {
  cuda_host::launch(kernel, grid, dim3{static_cast<unsigned>(threads)},
                    static_cast<size_t>(shared_bytes), params);
}

inline int& emulated_shared_bytes() {  // that a CTA may have
  static int bytes = 227 << 10;
  return bytes;
}
inline int shared_bytes_of_device() { return emulated_shared_bytes(); }

inline int& emulated_processors() {  // none: a test that wants many says so
  static int count = 0;
  return count;
}
inline int processors_of_device() { return emulated_processors(); }

template <class Params>
bool built_for_hopper(void (*)(Params)) {
  return true;
}

template <class Params>
int resident_ctas(void (*)(Params), int, int) {
  return emulated_ctas();
}

#else

using Stream = cudaStream_t;

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and must not be told again by torch's next check
  std::string message = std::string("pykvcache: CUDA error: ") + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice)
    message += "; rebuild with TORCH_CUDA_ARCH_LIST naming this GPU, or unset";
  throw std::runtime_error(message);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int shared_bytes_of_device() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

inline int processors_of_device() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Whether the device is a Hopper GPU and the kernel's code is sm_90a's: with code that was compiled
// from another architecture's PTX the version is another one.
template <class Params>
bool built_for_hopper(void (*kernel)(Params)) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion == 90;
}

// Lets a kernel have its shared memory; CTAs of it that the whole device holds at once. Asked of
// the driver once for each kernel and device.
template <class Params>
int resident_ctas(void (*kernel)(Params), int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  int& ctas = known[{reinterpret_cast<const void*>(kernel), device}];
  if (ctas > 0) return ctas;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, threads,
                                                      static_cast<size_t>(shared_bytes)));
  return ctas *= device_attribute(cudaDevAttrMultiProcessorCount);
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream,
            const Params& params) {
  if (shared_bytes > (48 << 10)) resident_ctas(kernel, threads, shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, params));
}

#endif

}  // namespace pykvcache::cuda
