// From int32 accumulators to y: what the kernels are given for it, and its arithmetic;
// store_tokens.cuh and store_channels.cuh store. Kernel ring: no torch.
//
// All types are chosen at run time, the same for all threads of a launch, so that a tile needs one
// instantiation and not one for each output type. The accumulators stay in registers.
#pragma once

#include <cstdint>

#include "gemm/memory_order.cuh"
#include "quantize/producer.cuh"
#include "sqk/gemm.h"

namespace sqk {

// What a GEMM kernel is given for its results.
struct Epilogue {
  const float* x_scale;
  const float* w_scale;
  const float* bias;
  const void* residual;
  void* y;
  const float* out_scale;
  int64_t residual_stride;
  int64_t y_stride;
  int32_t m, n;
  DType y_dtype;
  DType residual_dtype;
  bool x_per_token;
  bool w_per_channel;
  bool relu;
  bool wide;  // rows of y start at multiples of 16 bytes
  // 16-bit y in rows as above, a residual of the same type and so too, scales and bias in pairs:
  // what a model has. Whole groups of 32 channels then take the short way through store_tokens.
  bool plain;
};

// Host side: what the kernels need of the params.
inline Epilogue make_epilogue(const GemmParams& p) {
  const auto multiple_of = [](const void* base, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(base) % bytes == 0;
  };
  const auto wide = [&](const void* base, int64_t stride, DType dtype) {
    return multiple_of(base, 16) && (p.m <= 1 || stride * size_in_bytes(dtype) % 16 == 0);
  };
  Epilogue e = {};
  e.x_scale = p.x_scale;
  e.w_scale = p.w_scale;
  e.bias = p.bias;
  e.residual = p.residual;
  e.y = p.y;
  e.out_scale = p.out_scale;
  e.residual_stride = p.residual_stride;
  e.y_stride = p.y_stride;
  e.m = static_cast<int32_t>(p.m);
  e.n = static_cast<int32_t>(p.n);
  e.y_dtype = p.y_dtype;
  e.residual_dtype = p.residual_dtype;
  e.x_per_token = p.x_per_token != 0;
  e.w_per_channel = p.w_per_channel != 0;
  e.relu = p.relu != 0;
  e.wide = wide(p.y, p.y_stride, p.y_dtype);
  e.plain = e.wide && size_in_bytes(p.y_dtype) == 2 && multiple_of(p.w_scale, 8) &&
            multiple_of(p.bias, 8) &&
            (p.residual == nullptr || (p.residual_dtype == p.y_dtype &&
                                       wide(p.residual, p.residual_stride, p.residual_dtype)));
  return e;
}

// The contract of docs/internals/numerics.md, one rounding per operation.
__device__ inline float dequantise(int32_t acc, float w_scale, float x_scale, float bias) {
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), w_scale), x_scale, bias);
}

// -0 and not 0 where there is no bias: then the sum is the product, sign and all.
__device__ inline float load_bias(const Epilogue& e, int channel) {
  return e.bias != nullptr ? __ldg(e.bias + channel) : -0.0f;
}

// The kernel that writes the scales may still have been running when this one started. Called when
// a tile of x_q has arrived, which the same kernel wrote and this one has waited for.
__device__ inline float load_x_scale(const Epilogue& e, int token) {
  return load_fresh(e.x_scale + (e.x_per_token ? token : 0));
}

__device__ inline float load_residual(const Epilogue& e, int token, int channel) {
  const int64_t at = token * e.residual_stride + channel;
  if (e.residual_dtype == DType::kFloat32) return static_cast<const float*>(e.residual)[at];
  if (e.residual_dtype == DType::kFloat16) {
    return to_float(static_cast<const __half*>(e.residual)[at]);
  }
  return to_float(static_cast<const __nv_bfloat16*>(e.residual)[at]);
}

// The factor of an int8 result.
__device__ inline float load_out_factor(const Epilogue& e) {
  return e.y_dtype == DType::kInt8 ? inverse_of(__ldg(e.out_scale)) : 1.0f;
}

// ReLU keeps a NaN, which the conversion to int8 makes 0.
__device__ inline float requantise(const Epilogue& e, float v, float factor) {
  return __fmul_rn(e.relu && v < 0.0f ? 0.0f : v, factor);
}

}  // namespace sqk
