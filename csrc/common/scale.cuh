// The scale of a row, computed from its maximum. Kernel ring: no torch.
#pragma once

#include <cstdint>

namespace sqk {

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fffffffu;

// absmax_bits: the maximum of |v|, as AbsMax returns it.
__device__ inline float scale_of(uint32_t absmax_bits) {
  const float scale = __fdiv_rn(__uint_as_float(absmax_bits), 127.0f);
  return scale < kSmallestNormal ? 0.0f : scale;
}
// The factor for the values: 1 / scale, or 0 if the scale is not a normal number.
__device__ inline float inverse_of(float scale) {
  const bool usable = scale >= kSmallestNormal && scale < __uint_as_float(kInfinityBits);
  return usable ? __frcp_rn(scale) : 0.0f;
}
__device__ inline bool is_finite_bits(uint32_t absmax_bits) { return absmax_bits < kInfinityBits; }
// What is stored as the scale of a row under a static scale: NaN if the row has a NaN or Inf,
// because its int8 values would hide it.
__device__ inline float static_scale_of(uint32_t absmax_bits, float given) {
  return is_finite_bits(absmax_bits) ? given : __uint_as_float(kNanBits);
}

}  // namespace sqk
