// The kernel of attention to an int8 cache. Kernel ring: no torch.
//
// A block takes one head of keys of one sequence, all query heads that read it, and a part of the
// positions; its four warps take tiles of 16 of them in turn, each with sums of its own. At the end
// the warps add up theirs in shared memory, and the last of the blocks that share a sequence and a
// head those of all, both in a fixed order.
#pragma once

#include <cstdint>

#include "attention/queries.cuh"
#include "common/memory_order.cuh"

namespace sqk {

// What the warps of a block know of its queries.
template <int kColumns>
struct DecodeStats {
  float factor[kColumns];                 // of the scores
  float maximum[kDecodeWarps][kColumns];  // of the scores
  float sum[kDecodeWarps][kColumns];      // of the weights, of 2 ^ (score - maximum)

  struct Whole {
    float maximum, sum;
  };
  __device__ Whole of_block(int column) const {
    Whole whole = {minus_infinity(), 0.0f};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) whole.maximum = fmaxf(whole.maximum, maximum[w][column]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float share =
          exp2_approximately(__fsub_rn(maximum[w][column], subtrahend(whole.maximum)));
      whole.sum = __fmaf_rn(sum[w][column], share, whole.sum);
    }
    return whole;
  }
};

__device__ inline float reciprocal_or_zero(float x) { return x == 0.0f ? 0.0f : __frcp_rn(x); }

// Of a row of the block's means in shared memory: 64-bit accesses of a warp's lanes, four columns
// apart by two, meet all banks.
template <int kD>
constexpr int kMeanPitch = kD + 4;

// Adds up the warps' means of the values, weighted, in `means`, one warp after another.
template <int kD, int kTiles>
__device__ void merge_warps(DecodeSums<kD, kTiles>& sums, DecodeStats<8 * kTiles>& stats,
                            float* means) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t seen = sums.seen;
  seen |= __shfl_xor_sync(kFullWarp, seen, 1);
  seen |= __shfl_xor_sync(kFullWarp, seen, 2);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float sum = quad_sum(sums.sum[n]), maximum = sums.maximum[n];
    // Tokens, but all with scores of -Inf: they count only against others like them.
    if (sum == 0.0f && (seen >> 4 * n & 15) != 0) sum = 1.0f, maximum = kLowest;
    sums.maximum[n] = maximum;
    if (lane % 4 == 0) {
      stats.maximum[warp][8 * n + lane / 4] = maximum;
      stats.sum[warp][8 * n + lane / 4] = sum;
    }
  }
  __syncthreads();  // also: no warp reads its ring any more
  float factor[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const auto whole = stats.of_block(8 * n + lane / 4);
    const float share = exp2_approximately(__fsub_rn(sums.maximum[n], subtrahend(whole.maximum)));
    factor[n] = __fmul_rn(__fmul_rn(share, reciprocal_or_zero(whole.sum)), sums.unit(n));
  }
  const int from = 8 * (lane % 4);
#pragma unroll 1
  for (int turn = 0; turn < kDecodeWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float first = __shfl_sync(kFullWarp, factor[n], from);
        const float second = __shfl_sync(kFullWarp, factor[n], from + 4);
        float* const row = means + (8 * n + 2 * (lane % 4)) * kMeanPitch<kD> + 2 * (lane / 4);
#pragma unroll
        for (int b = 0; b < kD / 16; ++b) {
          auto* const upper = reinterpret_cast<float2*>(row + 16 * b);
          auto* const lower = reinterpret_cast<float2*>(row + 16 * b + kMeanPitch<kD>);
          const float (&v)[4] = sums.values[b][n];
          float2 x = {0.0f, 0.0f}, y = {0.0f, 0.0f};
          if (turn > 0) x = *upper, y = *lower;
          *upper = {__fmaf_rn(v[0], first, x.x), __fmaf_rn(v[2], first, x.y)};
          *lower = {__fmaf_rn(v[1], second, y.x), __fmaf_rn(v[3], second, y.y)};
        }
      }
    }
    __syncthreads();
  }
}

// Whether this block is the last of those that share the group.
__device__ inline bool is_last(uint32_t* ticket, int active) {
  // The barrier orders the whole block's results before one thread's ticket, and that thread's
  // fence makes them visible with it. The fence after the ticket does the same for the results of
  // earlier blocks, and the second barrier passes this on to the other threads.
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence_gpu();
    last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(active);
    fence_gpu();
    if (last) *ticket = 0;  // for the next launch: nobody else takes one in this launch
  }
  return __syncthreads_or(last);
}

// The mean over all splits, in their order. The first is `slot`.
template <int kD>
__device__ float merge_splits(const DecodeParams& p, int64_t slot, int columns, int active,
                              HeadRow<kD>& row) {
  const auto* const stats = reinterpret_cast<const float*>(p.stats);
  float maximum = minus_infinity(), weights = 0.0f;
#pragma unroll 4
  for (int i = 0; i < active; ++i) {
    maximum = fmaxf(maximum, load_fresh(stats + 2 * (slot + int64_t{i} * columns)));
  }
#pragma unroll
  for (int e = 0; e < HeadRow<kD>::kCount; ++e) row.v[0][e] = 0.0f;
#pragma unroll 4
  for (int i = 0; i < active; ++i) {
    const int64_t from = slot + int64_t{i} * columns;
    const float share =
        exp2_approximately(__fsub_rn(load_fresh(stats + 2 * from), subtrahend(maximum)));
    const float weight = __fmul_rn(load_fresh(stats + 2 * from + 1), share);
    weights = __fadd_rn(weights, weight);
    const float* const mean = p.partials + from * kD;
#pragma unroll
    for (int e = 0; e < HeadRow<kD>::kCount; ++e) {
      row.v[0][e] = __fmaf_rn(load_fresh(mean + HeadRow<kD>::channel(e)), weight, row.v[0][e]);
    }
  }
  const float inverse = reciprocal_or_zero(weights);
#pragma unroll
  for (int e = 0; e < HeadRow<kD>::kCount; ++e) row.v[0][e] = __fmul_rn(row.v[0][e], inverse);
  return maximum;
}

template <int kD, int kColumns>
__global__ void __launch_bounds__(kDecodeThreads, kColumns > 8 ? 2
                                                  : kD == 256  ? 3
                                                               : 4)
    decode_attention_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kTiles = kColumns / 8;
  extern __shared__ uint4 decode_storage[];
  __shared__ DecodeStats<kColumns> stats;
  auto* const storage = reinterpret_cast<uint8_t*>(decode_storage);
  uint8_t* const queries = storage + kDecodeWarps * decode_ring_bytes(kD);
  auto* const means = reinterpret_cast<float*>(storage);  // after the rings
  static_assert(4 * kColumns * kMeanPitch<kD> <= kDecodeWarps * decode_ring_bytes(kD));
  const auto address = [](const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  };
  // Before anything else: the queries, the cache, lengths, the table and the mask may come from the
  // kernel before this one, and the outputs and the workspace may lie where it still reads.
  wait_for_previous_kernel();
  allow_next_kernel();
  const int split = static_cast<int>(blockIdx.x % p.splits);
  const int number = static_cast<int>(blockIdx.x / p.splits);
  const DecodeGroup group(p, number, kColumns);
  const DecodeRange range(p, group.sequence, split);
  if (split >= max(range.active, 1)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  DecodeRing<kD> ring(p, range, group.sequence, group.head, address(storage));
#pragma unroll 1
  for (int column = warp; column < kColumns; column += kDecodeWarps) {
    const float factor = quantize_query<kD>(p, group, column, queries);
    if (lane == 0) stats.factor[column] = factor;
  }
  __syncthreads();
  float factor[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) factor[n] = stats.factor[8 * n + lane / 4];
  DecodeSums<kD, kTiles> sums(address(queries), factor);
  const DecodeLimits<kTiles> limits(p, range, group.sequence, group.head * p.group,
                                    group.first_column);
#pragma unroll 1
  for (int tile = range.tile + warp; tile < range.end_tile; tile += kDecodeWarps) {
    const uint32_t stage = ring.next();
    sums.add(stage, tile * kTileTokens, limits);
  }
  wait_for_copies<0>();
  merge_warps(sums, stats, means);

  const int columns = min(kColumns, p.columns - group.first_column);
  const int64_t first_slot = int64_t{number} * p.splits * kColumns;
  const bool alone = range.active <= 1;
#pragma unroll 1
  for (int column = warp; column < columns; column += kDecodeWarps) {
    const auto whole = stats.of_block(column);
    const float* const mean = means + column * kMeanPitch<kD>;
    HeadRow<kD> row;
#pragma unroll
    for (int e = 0; e < HeadRow<kD>::kCount; ++e) row.v[0][e] = mean[HeadRow<kD>::channel(e)];
    if (alone) {
      store_output(p, group, column, row, whole.maximum);
      continue;
    }
    const int64_t slot = first_slot + int64_t{split} * kColumns + column;
    if (lane == 0) p.stats[slot] = {whole.maximum, whole.sum};
#pragma unroll
    for (int e = 0; e < HeadRow<kD>::kCount; ++e) {
      __stcg(p.partials + slot * kD + HeadRow<kD>::channel(e), row.v[0][e]);
    }
  }
  if (alone || !is_last(p.tickets + number, range.active)) return;
#pragma unroll 1
  for (int column = warp; column < columns; column += kDecodeWarps) {
    HeadRow<kD> row;
    const float maximum = merge_splits(p, first_slot + column, kColumns, range.active, row);
    store_output(p, group, column, row, maximum);
  }
}

}  // namespace sqk
