// The weighted sums of each token's results. Kernel ring: no torch.
//
// A thread takes 16 bytes of a row of the output, so it reads 16 bytes of each of the token's rows.
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "common/valid_grouped.h"
#include "common/vector.cuh"
#include "sqk/grouped.h"

namespace sqk {
namespace {

constexpr int kCombineThreads = 128;
constexpr int64_t kMaxGridY = 65535;

struct CombineKernelParams {
  CombineParams c;
  int32_t pieces;  // of a row, of 16 bytes
  int32_t last_row;
};

// kVectors: every row starts at a multiple of 16 bytes.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kCombineThreads)
    combine_experts_kernel(const __grid_constant__ CombineKernelParams p) {
  const CombineParams& c = p.c;
  const int64_t token = blockIdx.x;
  const int32_t choices = static_cast<int32_t>(c.choices), n = static_cast<int32_t>(c.n);
  const int32_t* const position = c.position + token * choices;
  for (int piece = blockIdx.y * kCombineThreads + threadIdx.x; piece < p.pieces;
       piece += gridDim.y * kCombineThreads) {
    const int channel = piece * kVec<T>;
    const bool whole = kVectors && channel + kVec<T> <= n;
    float sum[kVec<T>];
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) sum[e] = -0.0f;  // x + -0 is x
#pragma unroll 4
    for (int choice = 0; choice < choices; ++choice) {
      const int32_t row = min(max(position[choice], 0), p.last_row);
      const float weight = visit_float(c.weights_dtype, [&](auto type) {
        using W = Element<decltype(type)>;
        return to_float(static_cast<const W*>(c.weights)[token * choices + choice]);
      });
      const T* const from = static_cast<const T*>(c.y) + row * c.y_stride + channel;
      Packed<T> packed;
      if (whole) {
        packed.bits = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < kVec<T>; ++e) {
          if (channel + e < n) packed.element[e] = from[e];
        }
      }
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        sum[e] = __fmaf_rn(weight, to_float(packed.element[e]), sum[e]);
      }
    }
    Packed<T> packed;
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) packed.element[e] = from_float<T>(sum[e]);
    T* const to = static_cast<T*>(c.out) + token * c.out_stride + channel;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = packed.bits;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) {
      if (channel + e < n) to[e] = packed.element[e];
    }
  }
}

using CombineKernel = void (*)(CombineKernelParams);

CombineKernel find_kernel(DType dtype, bool vectors) {
  return visit_float(dtype, [&](auto type) -> CombineKernel {
    using T = Element<decltype(type)>;
    return vectors ? combine_experts_kernel<T, true> : combine_experts_kernel<T, false>;
  });
}

}  // namespace

Status combine_experts(const CombineParams& params, cudaStream_t stream) {
  Status status = check(params);
  if (status != Status::kSuccess || params.tokens == 0) return status;
  Device device;  // so that a library without code for the GPU says so
  status = current_device(&device);
  if (status != Status::kSuccess) return status;
  const int64_t bytes = size_in_bytes(params.dtype);
  const bool vectors = are_rows_aligned(params.y, params.y_stride * bytes, params.y_rows, 16) &&
                       are_rows_aligned(params.out, params.out_stride * bytes, params.tokens, 16);
  CombineKernelParams p = {};
  p.c = params;
  p.pieces = static_cast<int32_t>(divide_up(params.n * bytes, 16));
  p.last_row = static_cast<int32_t>(params.y_rows - 1);
  const int64_t across = divide_up(int64_t{p.pieces}, kCombineThreads);
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(find_kernel(params.dtype, vectors));
  launch.grid = dim3(static_cast<unsigned>(params.tokens),
                     static_cast<unsigned>(across < kMaxGridY ? across : kMaxGridY));
  launch.block = dim3(kCombineThreads);
  launch.stream = stream;
  return launch_kernel(launch, &p);
}

}  // namespace sqk

extern "C" int32_t sqk_combine_experts(const sqk::CombineParams* params, void* stream) {
  return static_cast<int32_t>(sqk::combine_experts(*params, static_cast<cudaStream_t>(stream)));
}
