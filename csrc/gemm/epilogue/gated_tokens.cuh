// The epilogue of gated tiles that have tokens as the rows of the instruction. Kernel ring: no
// torch.
#pragma once

#include "gemm/epilogue/gated.cuh"
#include "gemm/epilogue/tokens.cuh"

namespace sqk {

// The factors of a lane's channels, in kPairs blocks of 8 channels of gate and as many of up.
template <int kPairs>
struct GatedFactors {
  float w_scale[4 * kPairs], bias[4 * kPairs];  // per block of gate, then of up: two channels
  float inv_smooth[2 * kPairs];

  __device__ void load(const Epilogue& e, int channel) {
#pragma unroll
    for (int i = 0; i < 4 * kPairs; ++i) {
      const int at = min(channel + 8 * (i / 2) + i % 2, e.n - 1);
      w_scale[i] = __ldg(e.w_scale + (e.w_per_channel ? at : 0));
      bias[i] = load_bias(e, at);
    }
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      // The first of a lane's two channels is the same in every block.
      const int at = channel / 16 * 8 + channel % 16 + 8 * (i / 2) + i % 2;
      inv_smooth[i] = load_inv_smooth(e, min(at, e.columns - 1));
    }
  }
};

// Stores kPairs blocks of 8 channels of y. `first` is the first row of the weight, a multiple of
// 16. acc is laid out as in store_tokens.
template <int kPairs>
__device__ inline void store_gated_group(const Epilogue& e, const int32_t* acc,
                                         const float (&x_scale)[2], float factor, int token0,
                                         int first) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  GatedFactors<kPairs> factors;
  factors.load(e, first + 2 * t);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = token0 + g + 8 * h;
    float gate[2 * kPairs], up[2 * kPairs];
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int32_t* const sum = acc + 8 * (i / 2) + 2 * h + i % 2;
      const int at = 4 * (i / 2) + i % 2;
      gate[i] = dequantize(sum[0], factors.w_scale[at], x_scale[h], factors.bias[at]);
      up[i] = dequantize(sum[4], factors.w_scale[at + 2], x_scale[h], factors.bias[at + 2]);
    }
#pragma unroll
    for (int i = 0; i < 2 * kPairs; i += 2) {
      round_pair(e.gate_dtype, gate[i], gate[i + 1]);
      round_pair(e.gate_dtype, up[i], up[i + 1]);
    }
    apply_gates(e.activation, gate, up);
    bool nonfinite = false;
    uint32_t word[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const float a = __fmul_rn(up[2 * p], factors.inv_smooth[2 * p]);
      const float b = __fmul_rn(up[2 * p + 1], factors.inv_smooth[2 * p + 1]);
      nonfinite |= first + 16 * p < e.n && (is_nonfinite(a) || is_nonfinite(b));
      word[p] = to_int8x4(__fmul_rn(a, factor), __fmul_rn(b, factor), 0.0f, 0.0f);
    }
    if (nonfinite && token < e.m) raise_y_scale(e, token, kLargestBits);
    if (first == 0 && t == 0 && token < e.m) {
      raise_y_scale(e, token, __float_as_uint(__ldg(e.out_scale)));
    }
    if constexpr (kPairs == 4) {
      transpose_quad(word);
      store_eight(e, word, token, first / 2 + 8 * t);
    } else {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) store_pair(e, word[p], token, first / 2 + 8 * p + 2 * t);
    }
  }
}

// As store_tokens. Changes acc: registers cannot be indexed at run time, and unrolling would repeat
// the long activations for each group, so the accumulators move up instead.
template <int kBlocks>
__device__ inline void store_gated_tokens(const Epilogue& e, int32_t* acc, int token0,
                                          int channel0) {
  static_assert(kBlocks % 2 == 0);
  constexpr int kPairs = kBlocks % 8 == 0 ? 4 : kBlocks / 2;
  constexpr int kGroups = kBlocks / 2 / kPairs, kWords = 8 * kPairs;
  const int g = threadIdx.x % 32 / 4;
  if (token0 >= e.m) return;
  float x_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) x_scale[h] = load_x_scale(e, min(token0 + g + 8 * h, e.m - 1));
  const float factor = load_out_factor(e);
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    const int first = channel0 + 16 * kPairs * group;
    if (first >= e.n) return;
    store_gated_group<kPairs>(e, acc, x_scale, factor, token0, first);
#pragma unroll
    for (int i = 0; i + kWords < 4 * kBlocks; ++i) acc[i] = acc[i + kWords];
  }
}

}  // namespace sqk
