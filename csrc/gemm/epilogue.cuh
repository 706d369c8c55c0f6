// From int32 accumulators to y: dequantise, add, round, store. Kernel ring: no torch.
//
// All types are chosen at run time, the same for all threads of a launch, so that a tile needs one
// instantiation and not one for each output type. The accumulators stay in registers.
#pragma once

#include <cstdint>

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
  bool wide;  // rows of y (and of the residual) start at multiples of 16 bytes
};

// Host side: what the kernels need of the params.
inline Epilogue make_epilogue(const GemmParams& p) {
  const auto aligned = [&](const void* base, int64_t stride, DType dtype) {
    const int64_t row = p.m > 1 ? stride * size_in_bytes(dtype) : 0;
    return base == nullptr || (reinterpret_cast<uintptr_t>(base) % 16 == 0 && row % 16 == 0);
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
  e.wide = aligned(p.y, p.y_stride, p.y_dtype) &&
           aligned(p.residual, p.residual_stride, p.residual_dtype);
  return e;
}

// The contract of docs/numerics.md, one rounding per operation.
__device__ inline float dequantise(int32_t acc, float w_scale, float x_scale, float bias) {
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), w_scale), x_scale, bias);
}

// -0 and not 0 where there is no bias: then the sum is the product, sign and all.
__device__ inline float load_bias(const Epilogue& e, int channel) {
  return e.bias != nullptr ? __ldg(e.bias + channel) : -0.0f;
}

// From L2: the kernel that writes the scales may still have been running when this one started.
__device__ inline float load_x_scale(const Epilogue& e, int token) {
  return __ldcg(e.x_scale + (e.x_per_token ? token : 0));
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

// Two values as they lie in memory, the first one low; of int8 in the low half.
__device__ inline uint32_t pack_pair(DType dtype, float a, float b) {
  if (dtype == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  return to_int8x4(a, b, 0.0f, 0.0f);
}

// Four lanes exchange words: word j of lane t becomes word t of lane j.
__device__ inline void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t got =
          __shfl_xor_sync(0xffffffffu, upper ? word[j] : word[j + step], step);
      if (upper) {
        word[j] = got;
      } else {
        word[j + step] = got;
      }
    }
  }
}

// Eight adjacent channels of a token from one lane: 16 bytes of a 16-bit type, 8 of int8.
__device__ inline void store_eight(const Epilogue& e, const uint32_t (&word)[4], int token,
                                   int channel) {
  if (token >= e.m || channel >= e.n) return;
  const int64_t at = token * e.y_stride + channel;
  const bool whole = e.wide && channel + 8 <= e.n;
  if (e.y_dtype == DType::kInt8) {
    auto* y = static_cast<int8_t*>(e.y) + at;
    const uint2 bytes = make_uint2(word[0] & 0xffffu | word[1] << 16, word[2] & 0xffffu | word[3] << 16);
    if (whole) {
      *reinterpret_cast<uint2*>(y) = bytes;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (channel + i < e.n) y[i] = static_cast<int8_t>(word[i / 2] >> 8 * (i % 2));
    }
    return;
  }
  auto* y = static_cast<uint16_t*>(e.y) + at;
  if (whole) {
    *reinterpret_cast<uint4*>(y) = make_uint4(word[0], word[1], word[2], word[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i < e.n) y[i] = static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2));
  }
}

__device__ inline void store_float_pair(const Epilogue& e, float a, float b, int token,
                                        int channel) {
  if (token >= e.m || channel >= e.n) return;
  float* y = static_cast<float*>(e.y) + (token * e.y_stride + channel);
  if (e.wide && channel + 2 <= e.n) {
    *reinterpret_cast<float2*>(y) = make_float2(a, b);
    return;
  }
  y[0] = a;
  if (channel + 1 < e.n) y[1] = b;
}

// Two adjacent channels of a token from one lane, 16-bit or int8.
__device__ inline void store_pair(const Epilogue& e, uint32_t word, int token, int channel) {
  if (token >= e.m || channel >= e.n) return;
  const int64_t at = token * e.y_stride + channel;
  const bool whole = e.wide && channel + 2 <= e.n;
  if (e.y_dtype == DType::kInt8) {
    auto* y = static_cast<int8_t*>(e.y) + at;
    if (whole) {
      *reinterpret_cast<uint16_t*>(y) = static_cast<uint16_t>(word);
      return;
    }
    y[0] = static_cast<int8_t>(word);
    if (channel + 1 < e.n) y[1] = static_cast<int8_t>(word >> 8);
    return;
  }
  auto* y = static_cast<uint16_t*>(e.y) + at;
  if (whole) {
    *reinterpret_cast<uint32_t*>(y) = word;
    return;
  }
  y[0] = static_cast<uint16_t>(word);
  if (channel + 1 < e.n) y[1] = static_cast<uint16_t>(word >> 16);
}

// Stores the accumulators of 16 tokens x 8 kBlocks channels as mma.sync and wgmma leave them in a
// warp: acc[4 b + 2 h + i] of lane 4 g + t belongs to token g + 8 h and channel 8 b + 2 t + i.
// All lanes of the warp must call alike; what lies behind m or n is not stored.
template <int kBlocks>
__device__ inline void store_tokens(const Epilogue& e, const int32_t* acc, int token0,
                                    int channel0) {
  // Blocks at a time: four fill a quad's 16-byte stores.
  constexpr int kGroup = kBlocks % 4 == 0 ? 4 : 1;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (token0 >= e.m) return;
  float x_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    x_scale[h] = load_x_scale(e, min(token0 + g + 8 * h, e.m - 1));
  }
  const float factor = load_out_factor(e);
#pragma unroll
  for (int group = 0; group < kBlocks / kGroup; ++group) {
    const int first = channel0 + 8 * kGroup * group;
    if (first >= e.n) return;
    float w_scale[2 * kGroup], bias[2 * kGroup];
#pragma unroll
    for (int i = 0; i < 2 * kGroup; ++i) {
      const int channel = min(first + 8 * (i / 2) + 2 * t + i % 2, e.n - 1);
      w_scale[i] = __ldg(e.w_scale + (e.w_per_channel ? channel : 0));
      bias[i] = load_bias(e, channel);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = token0 + g + 8 * h;
      float v[2 * kGroup];
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i) {
        v[i] = dequantise(acc[4 * kGroup * group + 4 * (i / 2) + 2 * h + i % 2], w_scale[i],
                          x_scale[h], bias[i]);
      }
      if (e.residual != nullptr && token < e.m) {
#pragma unroll
        for (int i = 0; i < 2 * kGroup; ++i) {
          const int channel = min(first + 8 * (i / 2) + 2 * t + i % 2, e.n - 1);
          v[i] = __fadd_rn(v[i], load_residual(e, token, channel));
        }
      }
      if (e.y_dtype == DType::kFloat32) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          store_float_pair(e, v[2 * j], v[2 * j + 1], token, first + 8 * j + 2 * t);
        }
        continue;
      }
      if (e.y_dtype == DType::kInt8) {
#pragma unroll
        for (int i = 0; i < 2 * kGroup; ++i) v[i] = requantise(e, v[i], factor);
      }
      uint32_t word[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) word[j] = pack_pair(e.y_dtype, v[2 * j], v[2 * j + 1]);
      if constexpr (kGroup == 4) {
        transpose_quad(word);
        store_eight(e, word, token, first + 8 * t);
      } else {
        store_pair(e, word[0], token, first + 2 * t);
      }
    }
  }
}

__device__ inline void store_one(const Epilogue& e, float v, float factor, int token,
                                 int channel) {
  const int64_t at = token * e.y_stride + channel;
  switch (e.y_dtype) {
    case DType::kFloat32:
      static_cast<float*>(e.y)[at] = v;
      break;
    case DType::kFloat16:
      static_cast<__half*>(e.y)[at] = __float2half_rn(v);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(e.y)[at] = __float2bfloat16_rn(v);
      break;
    case DType::kInt8:
      static_cast<int8_t*>(e.y)[at] = to_int8(requantise(e, v, factor));
      break;
  }
}

// The same for the transposed problem: 16 channels x 8 kBlocks tokens, acc[4 b + 2 h + i] of lane
// 4 g + t belongs to channel g + 8 h and token 8 b + 2 t + i. A kernel that has quantised x itself
// gives the scales of all its tokens, `own_x_scale`, in place of e.x_scale.
template <int kBlocks>
__device__ inline void store_channels(const Epilogue& e, const int32_t* acc, int channel0,
                                      int token0, const float* own_x_scale = nullptr) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float w_scale[2], bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int channel = min(channel0 + g + 8 * h, e.n - 1);
    w_scale[h] = __ldg(e.w_scale + (e.w_per_channel ? channel : 0));
    bias[h] = load_bias(e, channel);
  }
  const float factor = load_out_factor(e);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = token0 + 8 * b + 2 * t + i;
      if (token >= e.m) continue;
      const float x_scale = own_x_scale != nullptr
                                ? own_x_scale[token]
                                : load_x_scale(e, token);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int channel = channel0 + g + 8 * h;
        if (channel >= e.n) continue;
        float v = dequantise(acc[4 * b + 2 * h + i], w_scale[h], x_scale, bias[h]);
        if (e.residual != nullptr) v = __fadd_rn(v, load_residual(e, token, channel));
        store_one(e, v, factor, token, channel);
      }
    }
  }
}

}  // namespace sqk
