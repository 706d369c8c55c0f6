// What is computed before quantization. Kernel ring: no torch.
//
// Every product and sum is written out as one rounded operation (__fmul_rn, ...), so that no result
// depends on which operations the compiler contracts. docs/internals/numerics.md has the order and
// the bounds.
#pragma once

#include "common/activations.cuh"
#include "common/scale.cuh"
#include "sqk/quantize.h"

namespace sqk {

// The statistics that a norm needs of its row.
struct Moments {
  float mean = 0.0f;
  float rstd = 0.0f;
};

// 1 / sqrt(variance + eps). Squares that overflow float32 make the row NaN, not 0: a row that
// cannot be computed must not look valid.
__device__ inline float inverse_deviation(float sum_of_squares, int k, float eps) {
  const float variance = __fdiv_rn(sum_of_squares, static_cast<float>(k));
  const float rstd = __frcp_rn(__fsqrt_rn(__fadd_rn(variance, eps)));
  return sum_of_squares < __uint_as_float(kInfinityBits) ? rstd : __uint_as_float(kNanBits);
}

}  // namespace sqk
