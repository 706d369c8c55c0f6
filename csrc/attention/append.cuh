// The kernel that quantizes new keys and values into a cache. Kernel ring: no torch.
//
// 8, 16 or 32 lanes take a row, that is, one token of one head; each lane has 8 adjacent channels.
// So a warp takes up to four rows, and what a rotation mixes never leaves a row's lanes.
#pragma once

#include <cstdint>

#include "common/memory_order.cuh"
#include "common/reduce.cuh"
#include "common/rotate.cuh"
#include "common/scale.cuh"
#include "common/vector.cuh"
#include "cutlass/fast_math.h"
#include "sqk/kv_cache.h"

namespace sqk {

constexpr int kAppendThreads = 128;
constexpr int kAppendChannels = 8;  // of a lane

struct AppendParams {
  KvAppendParams q;
  int32_t rows;     // of each half: batch * heads * tokens
  int32_t shift;    // a row has 1 << shift lanes
  int64_t holding;  // positions that exist, at most 2^31; not for a ring
  cutlass::FastDivmod tokens, heads, block_size;
};

// Adjacent channels in float32; 0 from `end` on. These are plain loads, because the kernel before
// may have just written what they read; several heads read the same cos and sin.
template <typename T, bool kVectors>
__device__ void read_channels(const T* row, int channel, int end, float (&v)[kAppendChannels]) {
  if constexpr (kVectors) {
    if (channel >= end) return;
#pragma unroll
    for (int i = 0; i < kAppendChannels; i += kVec<T>) {
      Packed<T> packed;
      packed.bits = *reinterpret_cast<const uint4*>(row + channel + i);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) v[i + e] = to_float(packed.element[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kAppendChannels; ++e) {
      if (channel + e < end) v[e] = to_float(row[channel + e]);
    }
  }
}

// Two products and a sum, each rounded once.
template <typename T, bool kVectors>
__device__ void apply_rope(const KvAppendParams& q, const T* row, int sequence, int token,
                           int channel, float (&v)[kAppendChannels]) {
  const int turned = static_cast<int>(q.rope_dim), half = turned / 2;
  if (channel >= turned) return;
  float other[kAppendChannels] = {}, cosine[kAppendChannels] = {}, sine[kAppendChannels] = {};
  // The partners of a lane's channels belong to another lane, or to two of them: a second load,
  // which the first level of the cache serves, is simpler than an exchange.
  if constexpr (kVectors) {
    read_channels<T, true>(row, channel < half ? channel + half : channel - half, turned, other);
  } else {
#pragma unroll
    for (int e = 0; e < kAppendChannels; ++e) {
      const int c = channel + e;
      if (c < turned) other[e] = to_float(row[c < half ? c + half : c - half]);
    }
  }
  visit_float(q.rope_dtype, [&](auto type) {
    using R = Element<decltype(type)>;
    const R* const cos =
        static_cast<const R*>(q.cos) + sequence * q.cos_batch_stride + token * q.cos_token_stride;
    const R* const sin =
        static_cast<const R*>(q.sin) + sequence * q.sin_batch_stride + token * q.sin_token_stride;
    read_channels<R, kVectors>(cos, channel, turned, cosine);
    read_channels<R, kVectors>(sin, channel, turned, sine);
    return 0;
  });
#pragma unroll
  for (int e = 0; e < kAppendChannels; ++e) {
    if (!kVectors && channel + e >= turned) continue;
    const float signed_other = channel + e < half ? -other[e] : other[e];
    v[e] = __fadd_rn(__fmul_rn(v[e], cosine[e]), __fmul_rn(signed_other, sine[e]));
  }
}

struct Slot {
  int64_t block;
  int64_t in_block;
  bool exists;
};

__device__ inline Slot find_slot(const AppendParams& p, int sequence, int token) {
  const KvCache& cache = p.q.cache;
  const int first = p.q.positions == nullptr ? 0 : p.q.positions[sequence];
  const int64_t position = int64_t{first} + token;
  Slot slot = {sequence, position, first >= 0};
  int quotient, remainder;
  if (cache.ring) {
    // No more tokens than slots, so there is at most one turn after the remainder.
    p.block_size(quotient, remainder, first);
    slot.in_block = int64_t{remainder} + token;
    if (slot.in_block >= cache.block_size) slot.in_block -= cache.block_size;
    return slot;
  }
  slot.exists = slot.exists && position < p.holding;
  if (slot.exists && cache.table != nullptr) {
    p.block_size(quotient, remainder, static_cast<int>(position));
    slot.block = cache.table[sequence * cache.table_stride + quotient];
    slot.in_block = remainder;
    slot.exists = slot.block >= 0 && slot.block < cache.blocks;
  }
  return slot;
}

// kVectors: every row that is read, and every row of cos and sin, can be read 16 bytes at a time.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kAppendThreads, 8)  // at most 64 registers
    kv_append_kernel(const __grid_constant__ AppendParams p) {
  // Before anything else: k, v, cos, sin and the positions may come from the kernel before this
  // one, which may still read the cache.
  wait_for_previous_kernel();
  allow_next_kernel();
  const KvAppendParams& q = p.q;
  const bool values = blockIdx.y != 0;
  const KvTokens& from = values ? q.v : q.k;
  const KvHalf& to = values ? q.cache.v : q.cache.k;
  const int lane = static_cast<int>(threadIdx.x) & ((1 << p.shift) - 1);
  const int64_t number =
      static_cast<int64_t>(blockIdx.x) * (kAppendThreads >> p.shift) + (threadIdx.x >> p.shift);
  const bool inside = number < p.rows;
  // No lane leaves early: all take part in the exchanges below.
  int token, head, sequence;
  p.tokens(head, token, inside ? static_cast<int>(number) : 0);
  p.heads(sequence, head, head);
  const int channel = lane * kAppendChannels, dim = static_cast<int>(to.dim);
  const T* const row = static_cast<const T*>(from.data) + sequence * from.batch_stride +
                       head * from.head_stride + token * from.token_stride;

  float v[1][kAppendChannels] = {};
  if (inside) {
    read_channels<T, kVectors>(row, channel, dim, v[0]);
    if (!values && q.cos != nullptr) {
      apply_rope<T, kVectors>(q, row, sequence, token, channel, v[0]);
    }
  }
  const Slot slot = find_slot(p, sequence, token);
  if (from.inv_smooth != nullptr && inside) {
    float factors[kAppendChannels] = {};
    read_channels<float, kVectors>(from.inv_smooth + head * to.dim, channel, dim, factors);
#pragma unroll
    for (int e = 0; e < kAppendChannels; ++e) {
      if (kVectors || channel + e < dim) v[0][e] = __fmul_rn(v[0][e], factors[e]);
    }
  }
  if (q.rotation != 0) rotate<true, 1, 1>(v, q.rotation);

  float inverse = 1.0f;  // static: the factors are the reciprocals of the scales
  float scale = 0.0f;
  if (to.scale != nullptr) {
    AbsMax absmax;
#pragma unroll
    for (int e = 0; e < kAppendChannels; ++e) absmax.add(v[0][e]);  // 0 outside of the row
    uint32_t bits = absmax.bits();
    for (int step = 1 << p.shift >> 1; step > 0; step /= 2) {
      bits = max(bits, __shfl_xor_sync(kFullWarp, bits, step));
    }
    scale = scale_of(bits);
    inverse = inverse_of(scale);
  }
  if (!inside || !slot.exists) return;
  const int padded = static_cast<int>(padded_head(dim));
  if (channel < padded) {
    int8_t* const out = to.data + slot.block * to.block_stride + head * to.head_stride +
                        slot.in_block * padded + channel;
    *reinterpret_cast<uint2*>(out) = to_int8_vector(v[0], inverse);
  }
  if (lane == 0 && to.scale != nullptr) {
    to.scale[slot.block * to.scale_block_stride + head * to.scale_head_stride + slot.in_block] =
        scale;
  }
}

}  // namespace sqk
