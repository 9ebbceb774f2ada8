// The kernels as the launchers see them: functions over plain parameters. Each is defined in the
// .cu file that compiles it. No torch header here.
#pragma once

#include "cuda/kernel_params.h"
#include "cuda/kernel_shape.h"
#include "cuda/launch.cuh"

namespace pykvcache::cuda {

struct MergeStatesParams;
struct CopyParams;
struct GatherParams;
struct SlotMappingParams;

// Tensor cores: kDim is 64, 128 or 256 and covers D and Dv. decode_kernels.cu and
// prefill_kernels.cu (and wgmma_kernels.cu) are compiled once for each.
template <int kDim>
struct HeadDim {
  static int resident_decode_ctas(const KernelParams& params);
  static void decode(const KernelParams& params, Stream stream);
  static KernelShape decode_shape(const KernelParams& params);
  static void prefill(const KernelParams& params, Stream stream);
  static KernelShape prefill_shape(const KernelParams& params);
  // wgmma_kernels.cu: whether this build and device can run it.
  static bool has_wgmma_prefill(const KernelParams& params);
  static KernelShape wgmma_shape(const KernelParams& params);
  static void prefill_with_wgmma(const KernelParams& params, Stream stream);
};

// plain_kernels.cu
void plan(const KernelParams& params, Stream stream);
void merge_pieces(const KernelParams& params, Stream stream);
void attend_plainly(const KernelParams& params, Stream stream);
void merge_states(const MergeStatesParams& params, DType dtype, Stream stream);

// cache_kernels.cu
void write(const WriteArguments& arguments, Stream stream);
void copy_blocks(const CopyParams& params, int64_t pairs, Stream stream);
void gather(const GatherParams& params, int sides, Stream stream);
void map_slots(const SlotMappingParams& params, Stream stream);

}  // namespace pykvcache::cuda
