// What a warp does with 16 tokens: scores, the online softmax, and the weighted sum of the values.
// Kernel ring: no torch.
//
// The scores are queries (m16, rows) times keys (n8), the sums are values (m16) times weights (n8).
// So a lane's scores of queries 8 n + lane / 4 are its share of the second product's B operand as
// they stand, and nothing is exchanged. With 8 queries or fewer, half of the first product is
// wasted; the tensor cores are idle most of the time anyway.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "attention/ring.cuh"
#include "common/reduce.cuh"

namespace sqk {

constexpr float kLowest = -3.402823466e38f;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ inline float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What is subtracted in an exponent: without a score it must not be -Inf.
__device__ inline float subtrahend(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}
// Of the four lanes that share queries.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ inline float quad_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(kFullWarp, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Bytes 0 and 2, and bytes 1 and 3, as pairs of float16. With its sign bit flipped, an int8 x is
// the low byte of the float16 1024 + (x + 128), so that subtracting 1152 gives x exactly.
__device__ inline void widen(uint32_t bytes, uint32_t& even, uint32_t& odd) {
  const uint32_t flipped = bytes ^ 0x80808080u;
  const auto finish = [](uint32_t biased) {
    uint32_t halves;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(biased), "r"(0x64806480u));
    return halves;
  };
  even = finish(__byte_perm(flipped, 0x64646464u, 0x4240));
  odd = finish(__byte_perm(flipped, 0x64646464u, 0x4341));
}

// Which tokens the queries of this lane may attend to.
template <int kTiles>
struct DecodeLimits {
  const DecodeParams& p;
  const DecodeRange& range;
  int common_first, common_end;  // between them all queries attend to everything
  const uint8_t* mask;           // of the first head, or null
  // Of query 8 n + lane / 4: the head, counted from that one, and the token, in the lowest 3 bits.
  // Positions and addresses are made of it where they are needed, which saves registers.
  int query[kTiles];

  __device__ DecodeLimits(const DecodeParams& params, const DecodeRange& r, int sequence,
                          int first_head, int first_column)
      : p(params), range(r) {
    static_assert(kMaxQueryTokens <= 8);
    const int tokens = static_cast<int>(p.a.tokens);
    mask = p.a.mask == nullptr
               ? nullptr
               : p.a.mask + sequence * p.a.mask_batch_stride + first_head * p.a.mask_head_stride;
    common_first = max(range.first, p.window > 0 ? range.length - p.window : 0);
    common_end = p.a.mask != nullptr ? 0 : min(range.last, range.length - tokens + 1);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column =
          min(first_column + 8 * n + static_cast<int>(threadIdx.x % 32) / 4, p.columns - 1);
      const int head = column / tokens, token = column - head * tokens;
      query[n] = head << 3 | token;
    }
  }

  __device__ bool all(int position) const {
    return position >= common_first && position + kTileTokens <= common_end;
  }
  __device__ bool allows(int n, int position) const {
    const int head = query[n] >> 3, token = query[n] & 7;
    const int newest = range.length - static_cast<int>(p.a.tokens) + token;
    if (position < range.first || position >= range.last || position > newest ||
        (p.window > 0 && position <= newest - p.window)) {
      return false;
    }
    if (mask == nullptr) return true;
    const int before = max(0, range.length - static_cast<int>(p.holding));
    return mask[head * p.a.mask_head_stride + token * p.a.mask_token_stride +
                max(0, position - before) * p.a.mask_column_stride] != 0;
  }
};

// The state of a warp's 8 * kTiles queries.
template <int kD, int kTiles>
class DecodeSums {
 public:
  static constexpr int kBlocks = kD / 16;  // of channels
  static constexpr bool kNarrow = kTiles == 1;
  static constexpr int kRowTiles = kNarrow ? 1 : kTiles / 2;  // m16 of the scores
  static constexpr bool kHeld = kNarrow && kD <= 128;         // the queries are kept in registers

  // queries: quantized, [8 * kTiles][kD] in shared memory. factor: of the scores of this lane's.
  __device__ DecodeSums(uint32_t queries, const float (&factor)[kTiles]) : queries_(queries) {
    const int lane = threadIdx.x % 32;
    flat_ = swizzled<kD>(lane % 8, lane / 8);
    square_ = swizzled<kD>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      factor_[n] = factor[n];
      maximum[n] = minus_infinity();
      sum[n] = 0.0f;
      largest_[n] = 0.0f;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[b][n][i] = 0.0f;
      }
    }
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < kD / 64; ++j) load_matrices(held_[j], queries_ + (flat_ ^ (64 * j)));
    }
  }

  __device__ void add(uint32_t stage, int position, const DecodeLimits<kTiles>& limits) {
    // First, while the scores need no registers.
    const uint32_t allowed = limits.all(position) ? kAll : allowed_scores(position, limits);
    seen |= allowed;
    float score[kTiles][4];
    multiply_keys(stage, score);
    float key_scale[4];
    load_scales(stage, key_scale);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = __fmul_rn(__fmul_rn(score[n][i], key_scale[i]), factor_[n]);
      }
    }
    if (allowed != kAll) hide(allowed, score);

    float value_scale[4];
    load_scales(stage + 4 * kTileTokens, value_scale);
    uint32_t weight[kTiles][2];
    float factor[kTiles];
    bool scales = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      soften(n, score[n], value_scale, allowed >> 4 * n, weight[n], factor[n]);
      scales = scales || factor[n] != 1.0f;
    }
    if (__any_sync(kFullWarp, scales)) rescale(factor);
    add_values(stage, weight);
  }

  // What values[][n] must be multiplied by, apart from exp2(maximum), for query 8 n + lane / 4.
  __device__ float unit(int n) const { return __uint_as_float(exponent(largest_[n]) << 23); }

  float maximum[kTiles];  // of the scores, of query 8 n + lane / 4
  float sum[kTiles];      // of exp2(score - maximum), this lane's share
  uint32_t seen = 0;  // bits 4 n to 4 n + 3: whether it may attend to anything, this lane's share
  // Of channels 16 b + 2 (lane / 4) and the next one: queries 8 n + 2 (lane % 4) and the next one
  // of the first channel, then of the second.
  float values[kBlocks][kTiles][4];

 private:
  // The biased exponent, where neither its power of two nor the reciprocal is 0 or subnormal.
  __device__ static uint32_t exponent(float x) {
    return min(max(__float_as_uint(x) >> 23, 1u), 253u);
  }

  // The accumulators start with the bits of 1.5 * 2^23, so that they end with those of the float32
  // 1.5 * 2^23 + sum: the sums are smaller than 2^22.
  __device__ void multiply_keys(uint32_t stage, float (&score)[kTiles][4]) const {
    static_assert(128 * 127 * kD < 1 << 22);
    constexpr float kBias = 12582912.0f;
    int32_t acc[kRowTiles][2][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[m][0][i] = __float_as_int(kBias);
        acc[m][1][i] = __float_as_int(kBias);
      }
    }
#pragma unroll
    for (int j = 0; j < kD / 64; ++j) {
      uint32_t key[2][4];
      load_matrices(key[0], stage + (flat_ ^ (64 * j)));
      load_matrices(key[1], stage + 8 * kD + (flat_ ^ (64 * j)));
      uint32_t narrow[4];  // of 8 queries, two steps
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; ++i) narrow[i] = held_[j][i];
      } else if constexpr (kNarrow) {
        load_matrices(narrow, queries_ + (flat_ ^ (64 * j)));
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t first[2] = {key[0][2 * step], key[0][2 * step + 1]};
        const uint32_t second[2] = {key[1][2 * step], key[1][2 * step + 1]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t query[4];
          if constexpr (kNarrow) {
            query[0] = narrow[2 * step], query[2] = narrow[2 * step + 1];
            query[1] = query[3] = 0;
          } else {
            load_matrices(query, queries_ + 16 * m * kD + (square_ ^ (32 * (2 * j + step))));
          }
          multiply_add(acc[m][0], query, first);
          multiply_add(acc[m][1], query, second);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t bits = acc[n / 2][i / 2][2 * (n % 2) + i % 2];
        score[n][i] = __fsub_rn(__int_as_float(bits), kBias);
      }
    }
  }

  // Of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, t = lane % 4.
  __device__ static void load_scales(uint32_t stage, float (&scale)[4]) {
    const uint32_t from = stage + DecodeRing<kD>::kScales + 8 * (threadIdx.x % 4);
    const auto load = [&](int offset, float& low, float& high) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(low), "=f"(high)
                   : "r"(from + offset)
                   : "memory");
    };
    load(0, scale[0], scale[1]);
    load(32, scale[2], scale[3]);
  }

  static constexpr uint32_t kAll = 0xffffffffu;

  // Returns a bit for each score, 4 for a query.
  __device__ static uint32_t allowed_scores(int position, const DecodeLimits<kTiles>& limits) {
    uint32_t allowed = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * static_cast<int>(threadIdx.x % 4) + i % 2 + 8 * (i / 2);
        if (limits.allows(n, position + token)) allowed |= 1u << (4 * n + i);
      }
    }
    return allowed;
  }

  __device__ static void hide(uint32_t allowed, float (&score)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((allowed >> (4 * n + i) & 1) == 0) score[n][i] = minus_infinity();
      }
    }
  }

  // From scores to weights in float16. weight * scale of the values may lie outside of float16's
  // range, so the weights are divided by a power of two: that of their largest so far. A token that
  // is not allowed weighs 0 even if its scale is NaN.
  __device__ void soften(int n, const float (&score)[4], const float (&value_scale)[4],
                         uint32_t allowed, uint32_t (&weight)[2], float& factor) {
    const float before = maximum[n];
    const float tile_max = fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));
    maximum[n] = fmaxf(before, quad_max(tile_max));
    const float subtracted = subtrahend(maximum[n]);
    const float decay = exp2_approximately(__fsub_rn(before, subtracted));
    float scaled[4], tile_sum = 0.0f, most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float p = exp2_approximately(__fsub_rn(score[i], subtracted));
      tile_sum = __fadd_rn(tile_sum, p);
      scaled[i] = (allowed >> i & 1) != 0 ? __fmul_rn(p, value_scale[i]) : 0.0f;
      most = fmaxf(most, fabsf(scaled[i]));
    }
    sum[n] = __fmaf_rn(sum[n], decay, tile_sum);
    const float unit_before = unit(n);
    largest_[n] = fmaxf(__fmul_rn(largest_[n], decay), quad_max(most));
    const float inverse = __uint_as_float((254u - exponent(largest_[n])) << 23);
    // In this order nothing overflows: the second product is at most 2.
    factor = __fmul_rn(__fmul_rn(decay, inverse), unit_before);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 pair = __floats2half2_rn(__fmul_rn(scaled[2 * i], inverse),
                                             __fmul_rn(scaled[2 * i + 1], inverse));
      weight[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }

  // A lane's sums belong to other queries than its scores do.
  __device__ void rescale(const float (&factor)[kTiles]) {
    const int from = 8 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float first = __shfl_sync(kFullWarp, factor[n], from);
      const float second = __shfl_sync(kFullWarp, factor[n], from + 4);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[b][n][i] = __fmul_rn(values[b][n][i], i % 2 == 0 ? first : second);
        }
      }
    }
  }

  // ldmatrix transposes pairs of bytes, so that a word holds two channels of two tokens. Row g of
  // the product is therefore channel 2 g of the block, and row g + 8 is channel 2 g + 1.
  __device__ void add_values(uint32_t stage, const uint32_t (&weight)[kTiles][2]) {
    const uint32_t from = stage + DecodeRing<kD>::kValues;
#pragma unroll
    for (int b = 0; b < kBlocks; b += 2) {
      uint32_t word[4];
      load_transposed(word, from + (square_ ^ (16 * b)));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t value[4];
        widen(word[2 * i], value[0], value[1]);
        widen(word[2 * i + 1], value[2], value[3]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) multiply_add_halves(values[b + i][n], value, weight[n]);
      }
    }
  }

  uint32_t queries_;
  int flat_, square_;  // where ldmatrix reads 8 rows of 64 bytes, and 16 rows of 32
  float factor_[kTiles];
  float largest_[kTiles];  // weight * scale of the values
  uint32_t held_[kHeld ? kD / 64 : 1][4];
};

}  // namespace sqk
