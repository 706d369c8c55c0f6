// float32 -> int8: each thread takes one element per step. Kernel ring: no torch.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/arithmetic.h"
#include "cutlass/numeric_conversion.h"
#include "sqk/saturate.h"

namespace sqk {
namespace {

constexpr int kThreads = 256;
// Enough to fill any current GPU several times. The loop handles the rest, so the grid is valid for
// any numel.
constexpr int64_t kMaxBlocks = 4096;

__global__ void __launch_bounds__(kThreads) saturate_s8_kernel(SaturateParams params) {
  // cvt.rni.sat.s8.f32 rounds half to even and saturates; by the PTX ISA, NaN becomes 0.
  const cutlass::NumericConverter<int8_t, float, cutlass::FloatRoundStyle::round_to_nearest>
      convert;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < params.numel;
       i += step) {
    params.y[i] = convert(params.x[i]);
  }
}

}  // namespace

Status saturate_s8(const SaturateParams& params, cudaStream_t stream) {
  if (params.numel < 0) return Status::kInvalidArgument;
  if (params.numel == 0) return Status::kSuccess;  // an empty grid is a launch error
  if (params.x == nullptr || params.y == nullptr) return Status::kInvalidArgument;
  const int64_t blocks = std::min(kMaxBlocks, divide_up(params.numel, kThreads));
  saturate_s8_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return status_from_cuda(cudaGetLastError());
}

}  // namespace sqk

extern "C" int32_t sqk_saturate_s8(const float* x, int8_t* y, int64_t numel, void* stream) {
  return static_cast<int32_t>(sqk::saturate_s8({x, y, numel}, static_cast<cudaStream_t>(stream)));
}
