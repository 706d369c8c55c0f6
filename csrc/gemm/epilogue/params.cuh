// From int32 accumulators to y: the parameters and the arithmetic. tokens.cuh and channels.cuh
// store the results. Kernel ring: no torch.
//
// All types are chosen at run time and are the same for all threads of a launch, so a tile needs
// one instantiation, not one per output type. The accumulators stay in registers.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "common/dtype.cuh"
#include "common/memory_order.cuh"
#include "common/scale.cuh"
#include "sqk/gemm.h"

namespace sqk {

// What a GEMM kernel needs to turn its accumulators into y.
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
  int32_t columns;  // of y
  DType y_dtype;
  DType residual_dtype;
  bool x_per_token;
  bool w_per_channel;
  bool relu;
  bool wide;  // rows of y start at multiples of 16 bytes
  // The usual case in a model: y has 16 bits and wide rows, so does the residual, and w_scale and
  // bias can be read in pairs. store_tokens then has a faster path for whole groups of 32 channels.
  bool plain;
  Producer activation;  // and what follows: as in GemmParams
  DType gate_dtype;
  const float* inv_smooth;
  float* y_scale;
};

// On the host: takes what the kernels need from the params.
inline Epilogue make_epilogue(const GemmParams& p) {
  const auto wide = [&](const void* base, int64_t stride, DType dtype) {
    return are_rows_aligned(base, stride * size_in_bytes(dtype), p.m, 16);
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
  e.columns = static_cast<int32_t>(columns_of_y(p));
  e.y_dtype = p.y_dtype;
  e.residual_dtype = p.residual_dtype;
  e.x_per_token = p.x_per_token != 0;
  e.w_per_channel = p.w_per_channel != 0;
  e.relu = p.relu != 0;
  e.wide = wide(p.y, p.y_stride, p.y_dtype);
  e.plain = e.wide && size_in_bytes(p.y_dtype) == 2 && is_aligned(p.w_scale, 8) &&
            is_aligned(p.bias, 8) &&
            (p.residual == nullptr || (p.residual_dtype == p.y_dtype &&
                                       wide(p.residual, p.residual_stride, p.residual_dtype)));
  e.activation = p.activation;
  e.gate_dtype = p.gate_dtype;
  e.inv_smooth = p.inv_smooth;
  e.y_scale = p.y_scale;
  return e;
}

// As docs/internals/numerics.md specifies: one rounding per operation.
__device__ inline float dequantize(int32_t acc, float w_scale, float x_scale, float bias) {
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), w_scale), x_scale, bias);
}

// Without a bias -0, not 0: x + -0 is x, even for x = -0.
__device__ inline float load_bias(const Epilogue& e, int channel) {
  return e.bias != nullptr ? __ldg(e.bias + channel) : -0.0f;
}

// The kernel that writes the scales may still have been running when this one started. Call this
// after a tile of x_q has arrived: the same kernel wrote it, and this one has waited for it.
__device__ inline float load_x_scale(const Epilogue& e, int token) {
  return load_fresh(e.x_scale + (e.x_per_token ? token : 0));
}

__device__ inline float load_residual(const Epilogue& e, int token, int channel) {
  const int64_t at = token * e.residual_stride + channel;
  return visit_float(e.residual_dtype, [&](auto type) {
    return to_float(static_cast<const Element<decltype(type)>*>(e.residual)[at]);
  });
}

// 1 / out_scale, for int8 results.
__device__ inline float load_out_factor(const Epilogue& e) {
  return e.y_dtype == DType::kInt8 ? inverse_of(__ldg(e.out_scale)) : 1.0f;
}

// ReLU keeps a NaN, which the conversion to int8 turns into 0.
__device__ inline float requantize(const Epilogue& e, float v, float factor) {
  return __fmul_rn(e.relu && v < 0.0f ? 0.0f : v, factor);
}

}  // namespace sqk
