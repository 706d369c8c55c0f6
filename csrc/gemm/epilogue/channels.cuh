// The epilogue of tiles that have channels, not tokens, as the rows of the instruction. Kernel
// ring: no torch.
#pragma once

#include "gemm/epilogue/gated.cuh"

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

// The same for 8 channels of gate and as many of up. Two tokens at a time, because unrolling would
// repeat the activations; so acc and the scales move up.
template <int kBlocks>
__device__ inline void store_gated_channels(const Epilogue& e, const int32_t* given,
                                            LaneScales<kBlocks>& scales, int channel, int token0) {
  int32_t acc[4 * kBlocks];
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) acc[i] = given[i];
  if (channel >= e.n) return;
  const int column = channel / 16 * 8 + channel % 16;
  const float factor = load_out_factor(e), inv_smooth = load_inv_smooth(e, column);
  int8_t* const y = static_cast<int8_t*>(e.y) + column;
#pragma unroll 1
  for (int block = 0; block < kBlocks; ++block) {
    float gate[2], up[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gate[i] = dequantize(acc[i], scales.w_scale[0], scales.x_scale[i], scales.bias[0]);
      up[i] = dequantize(acc[2 + i], scales.w_scale[1], scales.x_scale[i], scales.bias[1]);
    }
    round_pair(e.gate_dtype, gate[0], gate[1]);
    round_pair(e.gate_dtype, up[0], up[1]);
    apply_gates(e.activation, gate, up);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = token0 + 8 * block + i;
      if (token >= e.m) continue;
      const float v = __fmul_rn(up[i], inv_smooth);
      if (is_nonfinite(v)) raise_y_scale(e, token, kLargestBits);
      if (column == 0) raise_y_scale(e, token, __float_as_uint(__ldg(e.out_scale)));
      y[token * e.y_stride] = to_int8(__fmul_rn(v, factor));
    }
#pragma unroll
    for (int i = 0; i + 4 < 4 * kBlocks; ++i) acc[i] = acc[i + 4];
#pragma unroll
    for (int i = 0; i + 2 < 2 * kBlocks; ++i) scales.x_scale[i] = scales.x_scale[i + 2];
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
  if (e.activation != Producer::kQuantize) {
    store_gated_channels(e, acc, scales, channel, token);
    return;
  }
  visit(e.y_dtype,
        [&](auto y) { store_channels_as<decltype(y)::value>(e, acc, scales, channel, token); });
}

}  // namespace sqk
