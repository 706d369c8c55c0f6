// What is computed before quantization. Kernel ring: no torch.
//
// Every product and sum is written out as one rounded operation (__fmul_rn, ...), so that no result
// depends on which operations the compiler contracts. docs/internals/numerics.md has the order and
// the bounds.
#pragma once

#include "common/scale.cuh"
#include "sqk/quantize.h"

namespace sqk {

// 1 / x to one unit in the last place; 0 for x = Inf and for x > 2^126.
__device__ inline float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// x / (1 + exp(-t)). If exp overflows, the quotient is -0; -Inf gives NaN, as the formula does in
// float64.
__device__ inline float times_sigmoid(float x, float t) {
  return __fmul_rn(x, reciprocal(__fadd_rn(1.0f, expf(-t))));
}

template <Producer kProducer>
__device__ float activate(float x) {
  if constexpr (kProducer == Producer::kRelu) {
    return x < 0.0f ? 0.0f : x;  // keeps NaN
  } else if constexpr (kProducer == Producer::kGelu) {
    const float half = __fmul_rn(0.5f, x);
    return __fmul_rn(half, __fadd_rn(1.0f, erff(__fmul_rn(x, 0.70710678118654752f))));
  } else if constexpr (kProducer == Producer::kGeluTanh) {
    // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)): no cancellation where tanh is near -1.
    constexpr float kTwiceRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    const float cubic = __fmaf_rn(__fmul_rn(0.044715f, __fmul_rn(x, x)), x, x);
    return times_sigmoid(x, __fmul_rn(kTwiceRoot, cubic));
  } else {
    static_assert(kProducer == Producer::kSilu);
    return times_sigmoid(x, x);
  }
}

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
