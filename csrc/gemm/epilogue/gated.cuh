// What the epilogues of gated GEMMs share: from a gate and an up to int8, with the operations of
// gemm_s8 and then act_quantize. Kernel ring: no torch.
//
// The rows of gate and up take turns in blocks of 8, so a thread holds the sums of both.
#pragma once

#include "common/activations.cuh"
#include "gemm/epilogue/params.cuh"

namespace sqk {

// Two values rounded to the type of the product.
__device__ inline void round_pair(DType dtype, float& a, float& b) {
  visit_float(dtype, [&](auto type) {
    constexpr DType kDType = decltype(type)::value;
    if constexpr (kDType == DType::kFloat16) {
      const float2 rounded = __half22float2(__floats2half2_rn(a, b));
      a = rounded.x, b = rounded.y;
    } else if constexpr (kDType == DType::kBFloat16) {
      const float2 rounded = __bfloat1622float2(__floats2bfloat162_rn(a, b));
      a = rounded.x, b = rounded.y;
    } else {
      static_assert(kDType == DType::kFloat32, "how is a value rounded to this type?");
    }
  });
}

// up = activation(gate) * up. One branch for all values, so that their chains of instructions can
// overlap.
template <int kCount>
__device__ inline void apply_gates(Producer activation, const float (&gate)[kCount],
                                   float (&up)[kCount]) {
  const auto apply = [&](auto producer) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      up[i] = __fmul_rn(activate<decltype(producer)::value>(gate[i]), up[i]);
    }
  };
  if (activation == Producer::kSilu) {
    apply(std::integral_constant<Producer, Producer::kSilu>{});
  } else if (activation == Producer::kGelu) {
    apply(std::integral_constant<Producer, Producer::kGelu>{});
  } else {
    apply(std::integral_constant<Producer, Producer::kGeluTanh>{});
  }
}

__device__ inline float load_inv_smooth(const Epilogue& e, int channel) {
  return e.inv_smooth != nullptr ? __ldg(e.inv_smooth + channel) : 1.0f;  // * 1 changes nothing
}

__device__ inline bool is_nonfinite(float v) {
  return !is_finite_bits(__float_as_uint(v) & 0x7fffffffu);
}

// y_scale holds zeros before the launch. Its bits grow to those of out_scale, and to those of a NaN
// if any block finds one in the row.
__device__ inline void raise_y_scale(const Epilogue& e, int token, uint32_t bits) {
  atomicMax(reinterpret_cast<uint32_t*>(e.y_scale) + token, bits);
}
constexpr uint32_t kLargestBits = 0xffffffffu;  // a NaN

}  // namespace sqk
