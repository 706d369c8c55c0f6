// The epilogue of tiles that have channels, not tokens, as the rows of the instruction. Kernel
// ring: no torch.
#pragma once

#include "gemm/epilogue/params.cuh"

namespace sqk {

template <DType kY>
__device__ inline void store_one(const Epilogue& e, float v, float factor, int64_t at) {
  if constexpr (kY == DType::kFloat32) {
    static_cast<float*>(e.y)[at] = v;
  } else if constexpr (kY == DType::kFloat16) {
    static_cast<__half*>(e.y)[at] = __float2half_rn(v);
  } else if constexpr (kY == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(e.y)[at] = __float2bfloat16_rn(v);
  } else if constexpr (kY == DType::kInt8) {
    static_cast<int8_t*>(e.y)[at] = to_int8(requantize(e, v, factor));
  } else {
    static_assert(kNotHandled<kY>, "how is a value of this type stored?");
  }
}

// What a lane needs for its two channels and 2 kBlocks tokens.
template <int kBlocks>
struct LaneScales {
  float w_scale[2], bias[2], x_scale[2 * kBlocks];
};

template <DType kY, int kBlocks>
__device__ inline void store_channels_as(const Epilogue& e, const int32_t* acc,
                                         const LaneScales<kBlocks>& scales, int channel,
                                         int token0) {
  const float factor = load_out_factor(e);
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    const int token = token0 + 8 * (i / 2) + i % 2;
    if (token >= e.m) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (channel + 8 * h >= e.n) continue;
      float v = dequantize(acc[4 * (i / 2) + 2 * h + i % 2], scales.w_scale[h], scales.x_scale[i],
                           scales.bias[h]);
      if (e.residual != nullptr) v = __fadd_rn(v, load_residual(e, token, channel + 8 * h));
      store_one<kY>(e, v, factor, token * e.y_stride + channel + 8 * h);
    }
  }
}

// Stores the accumulators of 16 channels x 8 kBlocks tokens as mma.sync and wgmma leave them in a
// warp: acc[4 b + 2 h + i] of lane 4 g + t belongs to channel g + 8 h and token 8 b + 2 t + i. A
// kernel that has quantized x itself passes the scales of all its tokens as `own_x_scale`, in place
// of e.x_scale.
template <int kBlocks>
__device__ inline void store_channels(const Epilogue& e, const int32_t* acc, int channel0,
                                      int token0, const float* own_x_scale = nullptr) {
  const int lane = threadIdx.x % 32;
  const int channel = channel0 + lane / 4, token = token0 + lane % 4 * 2;
  // All loads come before the first store: one wait instead of one per token.
  LaneScales<kBlocks> scales;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = min(channel + 8 * h, e.n - 1);
    scales.w_scale[h] = __ldg(e.w_scale + (e.w_per_channel ? at : 0));
    scales.bias[h] = load_bias(e, at);
  }
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    const int at = min(token + 8 * (i / 2) + i % 2, e.m - 1);
    scales.x_scale[i] = own_x_scale != nullptr ? own_x_scale[at] : load_x_scale(e, at);
  }
  visit(e.y_dtype,
        [&](auto y) { store_channels_as<decltype(y)::value>(e, acc, scales, channel, token); });
}

}  // namespace sqk
