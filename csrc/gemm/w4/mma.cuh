// INT8 GEMM by mma.sync with weights of 4 bits. Kernel ring: no torch.
//
// As mma/kernel.cuh, but a stage holds a group of 128 elements of k, with 4-bit weights and their
// steps and offsets, and a warp unpacks its weights in registers. The order of w_q is that of the
// instruction's B: a lane's weights of four steps are 16 adjacent bytes, so they need no ldmatrix.
#pragma once

#include "gemm/mma/kernel.cuh"
#include "gemm/w4/unpack.cuh"

namespace sqk {

struct W4MmaParams : MmaParams {
  const uint16_t* w_group;  // [groups, n]: a step, and an offset above it
};

// A stage's parts, in bytes: x_q, w_q, then a step and an offset per channel.
template <int kM, int kN>
struct W4Stage {
  static constexpr int kW = kM * kW4Group, kScales = kW + kN * kW4Bytes, kBytes = kScales + 2 * kN;
};

// Copies the steps and offsets of a tile's groups: each thread one channel. Rows of an odd n are
// aligned to 2 bytes only, so cp.async cannot: a value waits in a register for its stage.
//
// In shared memory, those of channels 8 j + g of a warp lie together for each g, as one lane takes
// them.
template <int kN, int kWarpN, int kThreads>
class W4ScaleCopy {
 public:
  static constexpr int kTiles = kWarpN / 8;
  static_assert(kN <= kThreads);

  __device__ W4ScaleCopy(const W4MmaParams& p, uint32_t channel0) : n_(p.epilogue.n) {
    const uint32_t channel = threadIdx.x % kN, in_warp = channel % kWarpN;
    from_ = p.w_group + min(channel0 + channel, static_cast<uint32_t>(n_) - 1);
    to_ = 2 * (channel - in_warp + in_warp % 8 * kTiles + in_warp / 8);
  }
  __device__ void load(int32_t group) {
    if (threadIdx.x < kN) value_ = __ldg(from_ + int64_t{group} * n_);
  }
  // With 128 added to the offset. `scales`: of the stage.
  __device__ void store(int8_t* scales) const {
    constexpr uint32_t kSign = 0x8000;
    if (threadIdx.x < kN) {
      *reinterpret_cast<uint16_t*>(scales + to_) = static_cast<uint16_t>(value_ ^ kSign);
    }
  }

 private:
  const uint16_t* from_;
  int32_t n_;
  int to_;
  uint32_t value_ = 0;
};

template <int kM, int kN, int kWarpsM, int kWarpsN, int kStages>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN, mma_blocks_per_sm(32 * kWarpsM * kWarpsN))
    w4_mma_gemm_kernel(const __grid_constant__ W4MmaParams p) {
  using Stage = W4Stage<kM, kN>;
  constexpr int kK = kW4Group, kThreads = 32 * kWarpsM * kWarpsN;
  constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  constexpr int kRows = kWarpM / 16, kTiles = kWarpN / 8;  // of 16 tokens, 8 channels
  constexpr int kSteps = kK / 32;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kStages >= 2 && Stage::kBytes % 128 == 0);
  // A lane's steps and offsets, two tiles a word: one load.
  struct alignas(2 * kTiles) Pairs {
    uint32_t word[kTiles / 2];
  };
  extern __shared__ __align__(128) int8_t stages[];

  const uint32_t tiles = static_cast<uint32_t>(p.m_tiles) * p.n_tiles;
  const uint32_t split = p.splits > 1 ? blockIdx.x / tiles : 0;
  const uint32_t tile = blockIdx.x - split * tiles;
  const TilePosition position = tile_position(p, tile);
  const SplitRange range = split_range(p.k_tiles, p.splits, split);

  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(stages));
  TileCopy<kM, kK, kThreads> x(p.x_q, p.x_q_stride, position.m * kM, p.epilogue.m);
  TileCopy<kN, kW4Bytes, kThreads> w(p.w_q, p.w_q_stride, position.n * kN, p.epilogue.n);
  W4ScaleCopy<kN, kWarpN, kThreads> scales(p, position.n * kN);

  // The last group of the range comes first, as in mma/kernel.cuh: only of it x_q may be partial.
  // Its weights are whole in memory, and those past k are multiplied by zeros.
  const int32_t last = range.first + range.count - 1;
  const int64_t k_last = int64_t{last} * kK;
  scales.load(last);
  x.copy_part(shared, k_last, static_cast<int>(min(int64_t{kK}, p.k - k_last)));
  w.copy_part(shared + Stage::kW, int64_t{last} * kW4Bytes, kW4Bytes);
  commit_copies();
  scales.store(stages + Stage::kScales);
  x.advance(int64_t{range.first} * kK);
  w.advance(int64_t{range.first} * kW4Bytes);
#pragma unroll
  for (int i = 1; i < kStages - 1; ++i) {
    if (i < range.count) {
      scales.load(range.first + i - 1);
      x.copy_whole(shared + i * Stage::kBytes);
      w.copy_whole(shared + i * Stage::kBytes + Stage::kW);
      scales.store(stages + i * Stage::kBytes + Stage::kScales);
    }
    x.advance(kK);
    w.advance(kW4Bytes);
    commit_copies();
  }
  // The stage that the first turn of the loop copies.
  if (kStages - 1 < range.count) scales.load(range.first + kStages - 2);

  // x_q: as in mma/kernel.cuh. w_q: lane 4 g + t takes piece t of channel g.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
  const uint32_t x_lane = swizzled<kK>(warp_m + lane % 16, lane / 16);
  const int w_lane = Stage::kW + swizzled<kW4Bytes>(warp_n + lane / 4, lane % 4);
  const int scale_lane = Stage::kScales + 2 * (warp_n + lane / 4 * kTiles);

  int32_t acc[kRows][kTiles][4] = {};
  uint32_t a[2][kRows][4], packed[kTiles][4], scale_pairs[kTiles / 2];
  const auto load_x = [&](uint32_t stage, int step) {
    const uint32_t from = (stage + x_lane) ^ 32 * step;
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_matrices(a[step % 2][i], from + i * 16 * kK);
  };
  const auto load_w = [&](uint32_t stage) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const auto word = *reinterpret_cast<const uint4*>(stages + stage + w_lane + j * 8 * kW4Bytes);
      packed[j][0] = word.x, packed[j][1] = word.y, packed[j][2] = word.z, packed[j][3] = word.w;
    }
    const auto pairs = *reinterpret_cast<const Pairs*>(stages + stage + scale_lane);
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) scale_pairs[j] = pairs.word[j];
  };

  wait_for_copies<kStages - 2>();
  __syncthreads();
  constexpr uint32_t kEnd = kStages * Stage::kBytes;
  uint32_t read = 0, write = kEnd - Stage::kBytes;  // stages, in bytes
  load_x(shared, 0);
  load_w(0);
#pragma unroll 1
  for (int done = 0; done < range.count; ++done) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[kTiles][2];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const W4Scale scale =
            j % 2 == 0 ? W4Scale::of<0>(scale_pairs[j / 2]) : W4Scale::of<2>(scale_pairs[j / 2]);
        unpack_w4(packed[j][step], scale, b[j][0], b[j][1]);
      }
      if (step == kSteps - 1) {
        // One barrier for both: the next stage must have arrived, and all warps must have read the
        // one that the next turn's copies overwrite.
        wait_for_copies<kStages - 2>();
        __syncthreads();
        read = read + Stage::kBytes == kEnd ? 0 : read + Stage::kBytes;
        load_w(read);  // after the last stage: never used
      }
      load_x(shared + read, (step + 1) % kSteps);
      if (step == 0) {
        if (done + kStages - 1 < range.count) {
          x.copy_whole(shared + write);
          w.copy_whole(shared + write + Stage::kW);
          scales.store(stages + write + Stage::kScales);
          if (done + kStages < range.count) scales.load(range.first + done + kStages - 1);
        }
        x.advance(kK);  // also past the end: a condition would cost more
        w.advance(kW4Bytes);
        commit_copies();  // also when empty: wait_for_copies counts groups
        write = write + Stage::kBytes == kEnd ? 0 : write + Stage::kBytes;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) multiply_add(acc[i][j], a[step % 2][i], b[j]);
      }
    }
  }

  if (p.splits > 1 && !combine_splits<kRows * kTiles, kThreads>(p, tile, split, acc[0][0])) return;
  store_rows<kRows, kTiles, false>(p.epilogue, acc[0][0], position.m * kM + warp_m,
                                   position.n * kN + warp_n);
}

template <int kM, int kN, int kWarpsM, int kWarpsN, int kStages>
Status launch_w4_mma(const GemmParams& params, const Device&, const GemmPlan& plan,
                     cudaStream_t stream) {
  W4MmaParams p;
  const Status status = make_mma_params<kM, kN, kW4Group>(params, plan, stream, p);
  if (status != Status::kSuccess) return status;
  p.w_group = reinterpret_cast<const uint16_t*>(params.w_group);
  constexpr auto* kKernel = &w4_mma_gemm_kernel<kM, kN, kWarpsM, kWarpsN, kStages>;
  constexpr int kSharedBytes = kStages * W4Stage<kM, kN>::kBytes;
  return launch_mma_kernel<kKernel, 32 * kWarpsM * kWarpsN, kSharedBytes>(p, stream);
}

}  // namespace sqk
