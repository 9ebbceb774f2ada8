// Encodes tensor maps with the driver's function, found at run time: nothing links libcuda. In the
// emulation of tests/cuda_host it is part of hopper_host.h. No torch header here.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

#ifndef KV_CUDA_HOST
namespace pykvcache::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled find_encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result));
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || found == nullptr)
    throw std::runtime_error("pykvcache: the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(found);
}

inline TensorMap encode_map(const BoxLayout& layout) {
  static const EncodeTiled encode = find_encode_tiled();
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(layout.sizes[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(layout.stride_bytes[i]);
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(layout.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map;
  // Any dtype of 2 bytes: bits are copied, and what lies outside is zeros.
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(layout.data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(
        "pykvcache: no tensor map for a cache of [" + std::to_string(layout.sizes[3]) + ", " +
        std::to_string(layout.sizes[2]) + ", " + std::to_string(layout.sizes[1]) + ", " +
        std::to_string(layout.sizes[0]) + "], strides " + std::to_string(layout.stride_bytes[2]) +
        ", " + std::to_string(layout.stride_bytes[1]) + ", " +
        std::to_string(layout.stride_bytes[0]) + " bytes: CUDA driver error " +
        std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace pykvcache::cuda
#endif
