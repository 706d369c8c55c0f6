// The C++ types of tensors in the kernels, and conversions between them and float32. Kernel ring:
// no torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sqk/dtype.h"

namespace sqk {

// The C++ type of a DType.
template <DType kDType>
struct ElementOf {
  static_assert(kNotHandled<kDType>, "the kernels have no C++ type for this DType");
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};
template <>
struct ElementOf<DType::kFloat16> {
  using Type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kInt8> {
  using Type = int8_t;
};

// Of a DTypeConstant, which `visit` passes.
template <typename Constant>
using Element = typename ElementOf<Constant::value>::Type;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Four int8 in [-127, 127], rounded half to even, NaN as 0; `a` goes to the lowest address.
__device__ inline uint32_t to_int8x4(float a, float b, float c, float d) {
  // max.NaN keeps a NaN, which the conversion then turns into 0. A symmetric quantizer never
  // returns -128. The conversion to int32 and the packing to int8 both saturate.
  const auto round = [](float x) {
    float clamped;
    int32_t integer;
    asm("max.NaN.f32 %0, %1, 0fC2FE0000;" : "=f"(clamped) : "f"(x));  // -127
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(integer) : "f"(clamped));
    return integer;
  };
  uint32_t high, packed;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(round(d)), "r"(round(c)));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
      : "=r"(packed)
      : "r"(round(b)), "r"(round(a)), "r"(high));
  return packed;
}

__device__ inline int8_t to_int8(float x) { return static_cast<int8_t>(to_int8x4(x, 0, 0, 0)); }

}  // namespace sqk
