// The epilogue of tiles that have tokens as the rows of the instruction. Kernel ring: no torch.
#pragma once

#include "gemm/epilogue/params.cuh"

namespace sqk {

// Float32 is stored by itself (store_float_pair). A type that is new to pack_pair is new to all of
// this file: what is packed and not int8 has 16 bits, and what is plain is float16 or bfloat16.
constexpr bool is_packed(DType dtype) { return dtype != DType::kFloat32; }

// Two values as they are stored, the first one in the low bits; int8 uses the low half only.
__device__ inline uint32_t pack_pair(DType dtype, float a, float b) {
  return visit_where<is_packed>(dtype, [=](auto type) -> uint32_t {
    constexpr DType kDType = decltype(type)::value;
    if constexpr (kDType == DType::kFloat16) {
      const __half2 pair = __floats2half2_rn(a, b);
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else if constexpr (kDType == DType::kBFloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      static_assert(kDType == DType::kInt8, "how are two values of this type packed?");
      return to_int8x4(a, b, 0.0f, 0.0f);
    }
  });
}

// Four lanes exchange words: word j of lane t becomes word t of lane j.
__device__ inline void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? word[j] : word[j + step], step);
      if (upper) {
        word[j] = got;
      } else {
        word[j + step] = got;
      }
    }
  }
}

// One lane stores eight adjacent channels of a token: 16 bytes of a 16-bit type, 8 of int8.
__device__ inline void store_eight(const Epilogue& e, const uint32_t (&word)[4], int token,
                                   int channel) {
  if (token >= e.m || channel >= e.columns) return;
  const int64_t at = token * e.y_stride + channel;
  const bool whole = e.wide && channel + 8 <= e.columns;
  if (e.y_dtype == DType::kInt8) {
    auto* y = static_cast<int8_t*>(e.y) + at;
    const uint2 bytes =
        make_uint2(word[0] & 0xffffu | word[1] << 16, word[2] & 0xffffu | word[3] << 16);
    if (whole) {
      *reinterpret_cast<uint2*>(y) = bytes;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (channel + i < e.columns) y[i] = static_cast<int8_t>(word[i / 2] >> 8 * (i % 2));
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
    if (channel + i < e.columns) y[i] = static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2));
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

// One lane stores two adjacent channels of a token, 16-bit or int8.
__device__ inline void store_pair(const Epilogue& e, uint32_t word, int token, int channel) {
  if (token >= e.m || channel >= e.columns) return;
  const int64_t at = token * e.y_stride + channel;
  const bool whole = e.wide && channel + 2 <= e.columns;
  if (e.y_dtype == DType::kInt8) {
    auto* y = static_cast<int8_t*>(e.y) + at;
    if (whole) {
      *reinterpret_cast<uint16_t*>(y) = static_cast<uint16_t>(word);
      return;
    }
    y[0] = static_cast<int8_t>(word);
    if (channel + 1 < e.columns) y[1] = static_cast<int8_t>(word >> 8);
    return;
  }
  auto* y = static_cast<uint16_t*>(e.y) + at;
  if (whole) {
    *reinterpret_cast<uint32_t*>(y) = word;
    return;
  }
  y[0] = static_cast<uint16_t>(word);
  if (channel + 1 < e.columns) y[1] = static_cast<uint16_t>(word >> 16);
}

constexpr bool are_all_halves_known() {
  for (int index = 0; index < kDTypes; ++index) {
    const auto type = static_cast<DType>(index);
    if (size_in_bytes(type) == 2 && type != DType::kFloat16 && type != DType::kBFloat16) {
      return false;
    }
  }
  return true;
}
static_assert(are_all_halves_known(), "a plain y is float16 or bfloat16");

// Converts to both types and selects one, which is shorter than a branch.
__device__ inline uint32_t pack_halves(bool bfloat16, float a, float b) {
  const uint32_t as_half = pack_pair(DType::kFloat16, a, b);
  return bfloat16 ? pack_pair(DType::kBFloat16, a, b) : as_half;
}

__device__ inline void add_halves(bool bfloat16, uint32_t pair, float& a, float& b) {
  const __half2 half = *reinterpret_cast<const __half2*>(&pair);
  // A bfloat16 is the upper half of a float32.
  const float low = bfloat16 ? __uint_as_float(pair << 16) : __low2float(half);
  const float high = bfloat16 ? __uint_as_float(pair & 0xffff0000u) : __high2float(half);
  a = __fadd_rn(a, low);
  b = __fadd_rn(b, high);
}

// One 16-byte store to global memory. In store_plain of the mma.sync kernels, nvcc 13.0 splits the
// assignment of a uint4 into four 4-byte stores, each of which touches all sectors again. It does
// not do so in wgmma kernels or in store_eight.
__device__ inline void store_16_bytes(void* to, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// The scales and biases of a lane's pairs of channels, in four blocks of 8 channels.
struct ChannelPairs {
  float2 w_scale[4], bias[4];

  __device__ void load(const Epilogue& e, int channel) {
    const float scalar = e.w_per_channel ? 0.0f : __ldg(e.w_scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w_scale[j] = make_float2(scalar, scalar);
      bias[j] = make_float2(-0.0f, -0.0f);  // as in load_bias
    }
    if (e.w_per_channel) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w_scale[j] = __ldg(reinterpret_cast<const float2*>(e.w_scale + channel + 8 * j));
      }
    }
    if (e.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bias[j] = __ldg(reinterpret_cast<const float2*>(e.bias + channel + 8 * j));
      }
    }
  }
};

// Stores 32 channels of a plain y, all inside of it. acc is laid out as in store_tokens.
__device__ inline void store_plain(const Epilogue& e, const ChannelPairs& pairs, const int32_t* acc,
                                   const float (&x_scale)[2], int token0, int first) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool bfloat16 = e.y_dtype == DType::kBFloat16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = token0 + g + 8 * h;
    const bool is_there = token < e.m;
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t* sum = acc + 4 * j + 2 * h;
      v[2 * j] = dequantize(sum[0], pairs.w_scale[j].x, x_scale[h], pairs.bias[j].x);
      v[2 * j + 1] = dequantize(sum[1], pairs.w_scale[j].y, x_scale[h], pairs.bias[j].y);
    }
    uint32_t word[4];
    if (e.residual != nullptr) {
      // Loaded in the layout of the stores; transpose_quad is its own inverse.
      uint4 added = make_uint4(0, 0, 0, 0);
      if (is_there) {
        const auto* row = static_cast<const uint16_t*>(e.residual) + token * e.residual_stride;
        added = *reinterpret_cast<const uint4*>(row + first + 8 * t);
      }
      word[0] = added.x, word[1] = added.y, word[2] = added.z, word[3] = added.w;
      transpose_quad(word);
#pragma unroll
      for (int j = 0; j < 4; ++j) add_halves(bfloat16, word[j], v[2 * j], v[2 * j + 1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = pack_halves(bfloat16, v[2 * j], v[2 * j + 1]);
    transpose_quad(word);
    if (is_there) {
      auto* row = static_cast<uint16_t*>(e.y) + token * e.y_stride;
      store_16_bytes(row + first + 8 * t, word);
    }
  }
}

// Stores 8 kGroup channels of any y, which may end anywhere. acc is laid out as in store_tokens.
template <int kGroup>
__device__ inline void store_group(const Epilogue& e, const int32_t* acc, const float (&x_scale)[2],
                                   float factor, int token0, int first) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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
      v[i] = dequantize(acc[4 * (i / 2) + 2 * h + i % 2], w_scale[i], x_scale[h], bias[i]);
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
      for (int i = 0; i < 2 * kGroup; ++i) v[i] = requantize(e, v[i], factor);
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

// Stores the accumulators of 16 tokens x 8 kBlocks channels as mma.sync and wgmma leave them in a
// warp: acc[4 b + 2 h + i] of lane 4 g + t belongs to token g + 8 h and channel 8 b + 2 t + i. All
// lanes of the warp must call this; results beyond m or n are not stored.
template <int kBlocks>
__device__ inline void store_tokens(const Epilogue& e, const int32_t* acc, int token0,
                                    int channel0) {
  // Blocks per step: four fill a quad's 16-byte stores.
  constexpr int kGroup = kBlocks % 4 == 0 ? 4 : 1;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (token0 >= e.m) return;
  float x_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) x_scale[h] = load_x_scale(e, min(token0 + g + 8 * h, e.m - 1));
  const float factor = load_out_factor(e);
#pragma unroll
  for (int group = 0; group < kBlocks / kGroup; ++group) {
    const int first = channel0 + 8 * kGroup * group;
    if (first >= e.n) return;
    if constexpr (kGroup == 4) {
      if (e.plain && first + 32 <= e.n) {
        ChannelPairs pairs;
        pairs.load(e, first + 2 * t);
        store_plain(e, pairs, acc + 16 * group, x_scale, token0, first);
        continue;
      }
    }
    store_group<kGroup>(e, acc + 4 * kGroup * group, x_scale, factor, token0, first);
  }
}

}  // namespace sqk
