// A head's channels, spread over a warp: quantizes the queries, and stores the outputs. Kernel
// ring: no torch.
#pragma once

#include <cstdint>

#include "attention/tile.cuh"
#include "common/dtype.cuh"
#include "common/rotate.cuh"
#include "common/scale.cuh"

namespace sqk {

constexpr float kLog2E = 1.4426950408889634f;

// Channel 32 e + lane is v[e].
template <int kD>
struct HeadRow {
  static constexpr int kCount = kD / 32;
  float v[1][kCount];

  __device__ static int channel(int e) { return 32 * e + static_cast<int>(threadIdx.x % 32); }
  __device__ void turn(int rotation) {
    if (rotation != 0) rotate<false, 1, 1>(v, rotation);
  }
  // factors: of this head, or null.
  __device__ void multiply(const float* factors, int dim) {
    if (factors == nullptr) return;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (channel(e) < dim) v[0][e] = __fmul_rn(v[0][e], factors[channel(e)]);
    }
  }
};

struct DecodeGroup {
  int sequence, head;  // of keys
  int first_column;

  __device__ DecodeGroup(const DecodeParams& p, int group, int columns) {
    const int heads = static_cast<int>(p.a.cache.heads);
    const int row = group / p.column_groups;
    first_column = (group - row * p.column_groups) * columns;
    sequence = row / heads;
    head = row - sequence * heads;
  }
};

// Query `column` of the group, as `reference.quantize` quantizes it, to `to` in shared memory.
// Returns the factor of its scores; their exponential is a power of 2. A missing query is 0.
template <int kD>
__device__ float quantize_query(const DecodeParams& p, const DecodeGroup& group, int column,
                                uint8_t* to) {
  using Row = HeadRow<kD>;
  const AttentionParams& a = p.a;
  const int dim = static_cast<int>(a.cache.k.dim), tokens = static_cast<int>(a.tokens);
  Row row;
#pragma unroll
  for (int e = 0; e < Row::kCount; ++e) row.v[0][e] = 0.0f;
  const int number = group.first_column + column;
  if (number < p.columns) {
    const int head = number / tokens, token = number - head * tokens;
    const int64_t offset = group.sequence * a.q_batch_stride +
                           (int64_t{group.head} * p.group + head) * a.q_head_stride +
                           token * a.q_token_stride;
    visit_float(a.dtype, [&](auto type) {
      const auto* const from = static_cast<const Element<decltype(type)>*>(a.q) + offset;
#pragma unroll
      for (int e = 0; e < Row::kCount; ++e) {
        if (Row::channel(e) < dim) row.v[0][e] = to_float(from[Row::channel(e)]);
      }
      return 0;
    });
  }
  row.multiply(a.k_smooth == nullptr ? nullptr : a.k_smooth + int64_t{group.head} * dim, dim);
  row.turn(a.rotation);
  AbsMax absmax;
#pragma unroll
  for (int e = 0; e < Row::kCount; ++e) absmax.add(row.v[0][e]);
  const float scale = scale_of(warp_max(absmax.bits())), inverse = inverse_of(scale);
#pragma unroll
  for (int e = 0; e < Row::kCount; ++e) {
    const int c = Row::channel(e);
    to[swizzled<kD>(column, c / 16) + c % 16] =
        static_cast<uint8_t>(to_int8(__fmul_rn(row.v[0][e], inverse)));
  }
  const float of_scores = __fdiv_rn(a.scale, static_cast<float>(max(a.rotation, 1)));
  return __fmul_rn(__fmul_rn(scale, of_scores), kLog2E);
}

// The mean of the values, which becomes query `column`'s output. maximum: of its scores, over all
// tokens.
template <int kD>
__device__ void store_output(const DecodeParams& p, const DecodeGroup& group, int column,
                             HeadRow<kD>& row, float maximum) {
  using Row = HeadRow<kD>;
  const AttentionParams& a = p.a;
  const int dim = static_cast<int>(a.cache.v.dim), tokens = static_cast<int>(a.tokens);
  const int number = group.first_column + column;
  const int head = number / tokens, token = number - head * tokens;
  row.turn(a.rotation);
  const float inverse = __frcp_rn(static_cast<float>(max(a.rotation, 1)));
#pragma unroll
  for (int e = 0; e < Row::kCount; ++e) {
    // All the tokens' scores are -Inf: Inf - Inf, as softmax has it.
    row.v[0][e] = maximum == kLowest ? __uint_as_float(kNanBits) : __fmul_rn(row.v[0][e], inverse);
  }
  row.multiply(a.v_smooth == nullptr ? nullptr : a.v_smooth + int64_t{group.head} * dim, dim);
  const int64_t query_head = int64_t{group.head} * p.group + head;
  const int64_t offset = ((group.sequence * a.heads + query_head) * tokens + token) * dim;
  visit_float(a.dtype, [&](auto type) {
    using T = Element<decltype(type)>;
    T* const to = static_cast<T*>(a.y) + offset;
#pragma unroll
    for (int e = 0; e < Row::kCount; ++e) {
      if (Row::channel(e) < dim) to[Row::channel(e)] = from_float<T>(row.v[0][e]);
    }
    return 0;
  });
}

}  // namespace sqk
