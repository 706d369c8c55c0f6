// The kernel that copies the rows of x_q, compiled for 9.0a alone: no other GPU has kernels that
// need it. Kernel ring: no torch.
#include <cuda_runtime.h>

#include "common/launch.h"
#include "common/memory_order.cuh"
#include "gemm/grouped/gather.h"

namespace sqk {
namespace {

struct GatherParams {
  const int8_t* x_q;
  const int32_t* rows;
  const int32_t* offsets;
  int8_t* to;
  int64_t x_q_stride, to_stride;
  int32_t m, k, x_rows, experts;
};

constexpr int kGatherWarps = 8;  // of a block; each copies a row

// Rows of no expert are left out.
__global__ void __launch_bounds__(32 * kGatherWarps)
    gather_rows_kernel(const __grid_constant__ GatherParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t row = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / 32;
  if (row >= p.m || row < load_fresh(p.offsets) || row >= load_fresh(p.offsets + p.experts)) return;
  const int64_t taken = min(max(load_fresh(p.rows + row), 0), p.x_rows - 1);
  const int8_t* const from = p.x_q + taken * p.x_q_stride;
  int8_t* const to = p.to + row * p.to_stride;
  const int lane = threadIdx.x % 32, whole = p.k / 16;
  constexpr int kAtOnce = 4;  // all loads come before the first store
  for (int first = lane; first < whole; first += 32 * kAtOnce) {
    int4 part[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + 32 * i;
      if (piece < whole) part[i] = load_fresh(reinterpret_cast<const int4*>(from) + piece);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + 32 * i;
      if (piece < whole) reinterpret_cast<int4*>(to)[piece] = part[i];
    }
  }
  // The memory of x_q may end with k.
  for (int i = 16 * whole + lane; i < p.k; i += 32) to[i] = load_fresh(from + i);
}

}  // namespace

Status gather_rows(const GroupedParams& params, bool overlap, cudaStream_t stream) {
  GatherParams p = {};
  p.x_q = params.x_q;
  p.rows = params.rows;
  p.offsets = params.offsets;
  p.to = static_cast<int8_t*>(params.workspace);
  p.x_q_stride = params.x_q_stride;
  p.to_stride = gathered_stride(params.k);
  p.m = static_cast<int32_t>(params.m);
  p.k = static_cast<int32_t>(params.k);
  p.x_rows = static_cast<int32_t>(params.x_rows);
  p.experts = static_cast<int32_t>(params.experts);
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(&gather_rows_kernel);
  launch.grid = dim3(static_cast<unsigned>(divide_up(params.m, int64_t{kGatherWarps})));
  launch.block = dim3(32 * kGatherWarps);
  launch.stream = stream;
  launch.overlap = overlap;
  return launch_kernel(launch, &p);
}

}  // namespace sqk
