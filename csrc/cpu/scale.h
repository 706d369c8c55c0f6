// The scale of a row, computed from its maximum. CPU ring: no torch, no CUDA.
#pragma once

#include <cstdint>
#include <cstring>

namespace sqk {

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool is_finite_bits(uint32_t absmax_bits) { return absmax_bits < kInfinityBits; }

// absmax / 127, or 0 where that is below the smallest normal number; NaN and Inf stay.
inline float scale_of(uint32_t absmax_bits) {
  const float scale = float_of(absmax_bits) / 127.0f;
  return scale < kSmallestNormal ? 0.0f : scale;
}
// The factor for the values: 1 / scale, or 0 if the scale is not a normal number.
inline float inverse_of(float scale) {
  return scale >= kSmallestNormal && scale < float_of(kInfinityBits) ? 1.0f / scale : 0.0f;
}

}  // namespace sqk
