// Moves elements between global memory and float32 registers. Kernel ring: no torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.cuh"
#include "sqk/dtype.h"

namespace sqk {

// Elements in one 16-byte access.
template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// 16 bytes, accessible as elements.
template <typename T>
union Packed {
  uint4 bits;
  T element[kVec<T>];
  __device__ Packed() : bits{0, 0, 0, 0} {}
};

// Activations are read once, so they must not evict the parameters, which every row reads, from L1.
// The read-only path (ld.global.nc) would be wrong: `sum` may overwrite x or the residual.
__device__ inline uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// v * inverse_scale as int8: as many bytes as the vector has elements.
template <int kCount>
using Int8Vector = std::conditional_t<kCount == 8, uint2, uint32_t>;

template <int kCount>
__device__ inline Int8Vector<kCount> to_int8_vector(const float (&v)[kCount], float inverse_scale) {
  static_assert(kCount == 4 || kCount == 8);
  uint32_t words[kCount / 4];
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    words[e / 4] =
        to_int8x4(__fmul_rn(v[e], inverse_scale), __fmul_rn(v[e + 1], inverse_scale),
                  __fmul_rn(v[e + 2], inverse_scale), __fmul_rn(v[e + 3], inverse_scale));
  }
  if constexpr (kCount == 8) {
    return make_uint2(words[0], words[1]);
  } else {
    return words[0];
  }
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

// A norm's weight may have another type than x. The type is chosen at run time and is the same for
// all threads.
template <int kCount>
__device__ inline void load_parameters(const void* base, DType dtype, int k, float (&out)[kCount]) {
  visit_float(dtype, [&](auto type) {
    using T = Element<decltype(type)>;
    const T* const first = static_cast<const T*>(base) + k;
    if constexpr (sizeof(T) == 4) {
      load_floats(first, out);
    } else {
      static_assert(sizeof(T) == 2, "how are parameters of this type loaded?");
      load_halves<T>(first, out);
    }
  });
}

__device__ inline float load_parameter(const void* base, DType dtype, int k) {
  return visit_float(dtype, [&](auto type) {
    return to_float(__ldg(static_cast<const Element<decltype(type)>*>(base) + k));
  });
}

}  // namespace sqk
