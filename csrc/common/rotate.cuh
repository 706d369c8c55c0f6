// Multiplies groups of adjacent channels by a Hadamard matrix with entries 1 and -1. Kernel ring:
// no torch.
//
// Stage h = 1, 2, 4, ... replaces channels i and i + h by their sum and their difference, each
// rounded once. Both channels are in one thread, in two lanes of a warp, or in two vectors of a
// thread. docs/internals/numerics.md has the order of the stages, which fixes every bit.
#pragma once

#include "common/reduce.cuh"

namespace sqk {

__device__ inline void add_and_subtract(float& low, float& high) {
  const float sum = __fadd_rn(low, high);
  high = __fsub_rn(low, high);
  low = sum;
}

// The stages between elements of a vector: 1, 2, ... apart, fewer than `steps`.
template <int kCount, int kV>
__device__ void rotate_elements(float (&v)[kCount][kV], int steps) {
#pragma unroll
  for (int step = 1; step < kV; step *= 2) {
    if (step >= steps) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if ((e & step) == 0) add_and_subtract(v[i][e], v[i][e + step]);
      }
    }
  }
}

// The stages between lanes. One loop for all vectors, so that the latencies of their exchanges
// overlap. All lanes must take part; those outside of the row belong to no group that has elements.
template <int kUnroll, int kCount, int kV>
__device__ void rotate_lanes(float (&v)[kCount][kV], int group, int distance) {
  const int lanes = min(32, group / distance);
#pragma unroll kUnroll
  for (int bit = 1; bit < lanes; bit *= 2) {
    // The product with 1 or -1 is exact, so this is a sum or a difference, rounded once.
    const float sign = (threadIdx.x & bit) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        v[i][e] = __fmaf_rn(v[i][e], sign, __shfl_xor_sync(kFullWarp, v[i][e], bit));
      }
    }
  }
}

// The stages between vectors of a thread that are `distance` channels apart, 2 * `distance`, ...
template <int kSpan, int kCount, int kV>
__device__ void rotate_vectors(float (&v)[kCount][kV], int group, int distance) {
  static_assert(kCount % kSpan == 0);
#pragma unroll
  for (int step = 1; step < kSpan; step *= 2) {
    if (step * distance >= group) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if ((i & step) == 0) add_and_subtract(v[i][e], v[i + step][e]);
      }
    }
  }
}

// A warp's 32 * kV adjacent channels are one vector of each lane. kAdjacent: a lane has kV adjacent
// ones; else each 32 lanes have adjacent ones. Groups larger than that need kSpan adjacent vectors.
// kUnroll: of the loop over stages between lanes; 5 saves time in the row's chain of instructions,
// 1 saves code.
template <bool kAdjacent, int kSpan, int kUnroll, int kCount, int kV>
__device__ void rotate(float (&v)[kCount][kV], int group) {
  if constexpr (kAdjacent) {
    // Without branches if all stages are needed: where they meet, values would be moved.
    group < kV ? rotate_elements(v, group) : rotate_elements(v, kV);
    rotate_lanes<kUnroll>(v, group, kV);
  } else {
    rotate_lanes<kUnroll>(v, group, 1);
    rotate_elements(v, group / 32);
  }
  rotate_vectors<kSpan>(v, group, 32 * kV);
}

}  // namespace sqk
