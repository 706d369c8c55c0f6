// Moving elements between global memory and float32 registers. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "common/element.cuh"

namespace sqk {

// Elements in one 16-byte access.
template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

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

// Sixteen bytes seen as elements.
template <typename T>
union Packed {
  uint4 bits;
  T element[kVec<T>];
  __device__ Packed() : bits{0, 0, 0, 0} {}
};

// Activations are read once: they must not push the parameters, which every row reads, out of L1.
// Not the read-only path (ld.global.nc): `sum` may lie where x or the residual was.
__device__ inline uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// kCount adjacent float32 or 16-bit parameters, aligned to kCount of them (at most 16 bytes).
template <int kCount>
__device__ inline void load_floats(const float* address, float (&out)[kCount]) {
  static_assert(kCount % 4 == 0, "16 bytes at a time");
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(address + i));
    out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
  }
}

template <typename T, int kCount>
__device__ inline void load_halves(const void* address, float (&out)[kCount]) {
  union {
    uint2 bits[kCount / 4];
    T element[kCount];
    __device__ T operator[](int i) const { return element[i]; }
  } packed;
  if constexpr (kCount == 8) {
    const uint4 v = __ldg(static_cast<const uint4*>(address));
    packed.bits[0] = make_uint2(v.x, v.y);
    packed.bits[1] = make_uint2(v.z, v.w);
  } else {
    packed.bits[0] = __ldg(static_cast<const uint2*>(address));
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(packed[i]);
}

// A norm's weight may have another type than x: chosen at run time, the same for all threads.
template <int kCount>
__device__ inline void load_parameters(const void* base, DType dtype, int k, float (&out)[kCount]) {
  visit_float(dtype, [&](auto type) {
    using T = Element<decltype(type)>;
    const T* const first = static_cast<const T*>(base) + k;
    if constexpr (sizeof(T) == 4) {
      load_floats(first, out);
    } else {
      load_halves<T>(first, out);
    }
  });
}

__device__ inline float load_parameter(const void* base, DType dtype, int k) {
  return visit_float(dtype, [&](auto type) {
    return to_float(__ldg(static_cast<const Element<decltype(type)>*>(base) + k));
  });
}

// Four int8 in [-127, 127], half to even, NaN to 0: the element of the lowest address first.
__device__ inline uint32_t to_int8x4(float a, float b, float c, float d) {
  // max.NaN keeps a NaN, which the conversion then makes 0; -128 is no value of a symmetric
  // quantiser. The conversion to int32 saturates, and so does the packing to int8.
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
