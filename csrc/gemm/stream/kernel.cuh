// The GEMM for few tokens, whose time is that of reading the weights. Kernel ring: no torch.
//
// mma.sync has the weights as its 16 rows and the tokens, in groups of 8, as its columns. An
// integer sum does not depend on the order of k. So the four words that a lane loads at once can
// serve as its words of two fragments, as long as both operands are permuted alike: neither
// ldmatrix nor an exchange between lanes is needed. The warps of a block share k and add up their
// sums in shared memory. The tensor cores are idle nine tenths of the time, so columns without a
// token cost nothing.
#pragma once

#include <type_traits>

#include "common/memory_order.cuh"
#include "gemm/epilogue/channels.cuh"
#include "gemm/stream/ring.cuh"
#include "gemm/stream/rows.cuh"

namespace sqk {

// Fetches the epilogue's parameters of a tile into L2 while its weights arrive. A short problem
// would otherwise end with a wait for memory.
__device__ inline void prefetch_channels(const Epilogue& e, int channel0) {
  const int lane = threadIdx.x % 32, channel = min(channel0 + lane % 16, e.n - 1);
  const float* const base = lane < 16 ? e.w_scale : e.bias;
  if (base == nullptr || (lane < 16 && !e.w_per_channel)) return;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(base + channel));
}

// T: the type of x, which each block quantizes for itself; int8_t if x_q is given.
template <typename T, int kGroups, bool kW4, typename Params>
__device__ __forceinline__ void stream_gemm(const Params& p) {
  constexpr bool kQuantizes = !std::is_same_v<T, int8_t>;
  using Ring = StreamRing<kGroups, kQuantizes, kW4, Params>;
  using Sums = StreamSums<kGroups>;
  extern __shared__ uint4 stream_storage[];
  auto* const storage = reinterpret_cast<uint8_t*>(stream_storage);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  uint8_t* const activations = storage + warps * kWarpRing<kW4>;
  auto& sums = *reinterpret_cast<Sums*>(activations + p.activation_bytes);
  for (int i = threadIdx.x; i < 2 * 4 * kGroups * 32; i += blockDim.x) sums.sum[0][0][i] = 0;

  // Weights may be requested while the kernel before this one still runs. Otherwise the activations
  // are requested first: after all the weights they would arrive late.
  Ring ring(p, storage);
  if (p.weights_first) ring.start();
  wait_for_previous_kernel();
  allow_next_kernel();
  const auto start = [&] {
    if (!p.weights_first) ring.start();
  };
  if constexpr (kQuantizes) {
    if (p.wide) {
      RowQuantizer<T, true, kW4>(p, activations, sums.x_scale, sums.maxima).run(start);
    } else {
      RowQuantizer<T, false, kW4>(p, activations, sums.x_scale, sums.maxima).run(start);
    }
  } else if (p.weights_first) {
    load_rows<kW4>(p, activations);
  } else {
    if (kW4 || p.resident) copy_rows<kW4>(p, activations);
    start();
    wait_for_copies<kStreamStages>();
    if constexpr (kW4) transpose_rows(p, activations);
  }
  __syncthreads();

  int turn = 0;
  for (int tile = p.first_tile(), i = 0; tile < p.tiles; tile += p.tile_step()) {
    const int channel0 = tile * kStreamChannels;
    if (warp == i) prefetch_channels(p.epilogue, channel0);
    int32_t acc[4 * kGroups] = {};
#pragma unroll 1
    for (int stage = warp; stage < p.stages; stage += warps) {
      typename Ring::Chunk chunk[2];
      ring.next(stage, chunk);
#pragma unroll
      for (int c = 0; c < 2; ++c) chunk[c].multiply(acc);
    }
    if (warp < p.stages) {
#pragma unroll
      for (int j = 0; j < 4 * kGroups; ++j) atomicAdd(&sums.sum[turn][j][lane], acc[j]);
    }
    // One barrier per tile is enough: the warp that empties a buffer reaches the next tile's
    // barrier before any warp adds to that buffer again.
    __syncthreads();
    if (warp == i) {
#pragma unroll
      for (int j = 0; j < 4 * kGroups; ++j) {
        acc[j] = sums.sum[turn][j][lane];
        sums.sum[turn][j][lane] = 0;
      }
      store_channels<kGroups>(p.epilogue, acc, channel0, 0, kQuantizes ? sums.x_scale : nullptr);
    }
    turn ^= 1;
    i = i + 1 == warps ? 0 : i + 1;
  }
  wait_for_copies<0>();  // only empty groups, but no copy may be pending at the end
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(32 * kStreamWarps, 1)
    stream_gemm_kernel(const __grid_constant__ StreamParams p) {
  stream_gemm<T, kGroups, false>(p);
}

// The same for weights of 4 bits, which are in k in the order of mma.sync.
template <typename T, int kGroups>
__global__ void __launch_bounds__(32 * kStreamWarps, 1)
    w4_stream_gemm_kernel(const __grid_constant__ StreamParams p) {
  stream_gemm<T, kGroups, true>(p);
}

}  // namespace sqk
