// The C++ type of a DType in the kernels. Kernel ring: no torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sqk/dtype.h"

namespace sqk {

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

}  // namespace sqk
