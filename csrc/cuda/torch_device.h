// Where torch meets the device: which tensors belong here, the current stream. In the emulation of
// tests/cuda_host the operators work on CPU tensors. Torch-facing; included by launchers only.
#pragma once

#include "check.h"
#include "cuda/launch.cuh"
#include "registration.h"

#ifdef KV_CUDA_HOST
#define KV_CUDA_DISPATCH_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define KV_CUDA_DISPATCH_KEY CUDA
#endif

namespace pykvcache::cuda {

#ifdef KV_CUDA_HOST

inline Place place_of(const Tensor&) { return {"cuda"}; }

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return nullptr; }
};

#else

// Values are not read: that would wait for the GPU, and end the capture of a graph.
inline Place place_of(const Tensor& t) {
  if (!t.is_cuda()) fail("backend 'cuda' needs CUDA tensors");
  return {"cuda", t.get_device_index(), false};
}

// Makes the tensor's device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<Stream>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

}  // namespace pykvcache::cuda
