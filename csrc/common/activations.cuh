// Activation functions, with every product and sum written out as one rounded operation, as in
// quantize/producer.cuh. Kernel ring: no torch.
#pragma once

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

}  // namespace sqk
