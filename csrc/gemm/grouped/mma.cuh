// INT8 GEMM by experts with mma.sync. Kernel ring: no torch.
//
// A block computes a tile of y as mma_gemm_kernel does, with the rows and the weights of one
// expert. It finds them in the offsets, which only the GPU knows; so there are as many blocks as
// there can be tiles at most, and those without a tile end at once.
#pragma once

#include "gemm/grouped/epilogue.cuh"
#include "gemm/grouped/experts.cuh"
#include "gemm/grouped/kernels.h"
#include "gemm/mma/kernel.cuh"

namespace sqk {

struct GroupedMmaParams {
  const int8_t* x_q;
  const int8_t* w_q;
  const int32_t* rows;  // null: row r of y has row r of x_q
  int64_t x_q_stride, w_q_stride, w_q_expert_stride;
  ExpertRows experts;
  int32_t last_x_row;
  int32_t k;
  int32_t k_tiles, n_tiles;
  Epilogue epilogue;
};

template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN, mma_blocks_per_sm(32 * kWarpsM * kWarpsN))
    grouped_mma_gemm_kernel(const __grid_constant__ GroupedMmaParams p) {
  using Tile = MmaTile<kM, kN, kK, kWarpsM, kWarpsN, kStages>;
  // The blocks of an expert follow each other, so its weights are read from memory once.
  const uint32_t n_tiles = p.n_tiles;
  const ExpertTiles found = find_expert<kM>(p.experts, blockIdx.x / n_tiles);
  if (found.tiles == 0) return;
  const uint32_t groups = divide_up(found.tiles, uint32_t{kRasterTokens / kM});
  const TilePosition position = tile_position(
      found.tiles, n_tiles, groups == 1 ? found.tiles : divide_up(found.tiles, groups),
      blockIdx.x - found.before * n_tiles);
  const uint32_t row0 = found.first + position.m * kM, channel0 = position.n * kN;
  if (found.expert < 0) {
    store_zeros<kM, kN, Tile::kThreads>(p.epilogue, row0, found.last, channel0);
    return;
  }

  const auto place = [&](uint32_t row) {
    return p.rows == nullptr ? row : static_cast<uint32_t>(min(max(p.rows[row], 0), p.last_x_row));
  };
  const int8_t* const weights = p.w_q + found.expert * p.w_q_expert_stride;
  typename Tile::XCopy x(p.x_q, p.x_q_stride, row0, found.last, place);
  typename Tile::WCopy w(weights, p.w_q_stride, channel0, p.epilogue.n);
  typename Tile::Sums acc = {};
  Tile::multiply(x, w, p.k, {0, p.k_tiles}, acc);
  store_rows<Tile::kRows, 2 * Tile::kColumns, false>(
      epilogue_of(p.epilogue, found.expert, found.last), acc[0][0], row0 + Tile::warp_m(),
      channel0 + Tile::warp_n());
}

template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages>
Status launch_grouped_mma(const GroupedParams& params, const Device&, const GroupedPlan& plan,
                          cudaStream_t stream) {
  GroupedMmaParams p = {};
  p.x_q = params.x_q;
  p.w_q = params.w_q;
  p.rows = params.rows;
  p.x_q_stride = params.x_q_stride;
  p.w_q_stride = params.w_q_stride;
  p.w_q_expert_stride = params.w_q_expert_stride;
  p.experts = {params.offsets, static_cast<int32_t>(params.experts),
               static_cast<int32_t>(params.m)};
  p.last_x_row = static_cast<int32_t>(params.x_rows - 1);
  p.k = static_cast<int32_t>(params.k);
  p.k_tiles = static_cast<int32_t>(divide_up(params.k, kK));
  p.n_tiles = static_cast<int32_t>(divide_up(params.n, kN));
  p.epilogue = make_grouped_epilogue(params);

  constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  constexpr auto* kKernel = &grouped_mma_gemm_kernel<kM, kN, kK, kWarpsM, kWarpsN, kStages>;
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(kKernel);
  launch.grid = dim3(static_cast<unsigned>(plan.blocks));
  launch.block = dim3(kThreads);
  launch.shared_bytes = plan.shared_bytes;
  launch.stream = stream;
  static DevicesSeen seen;
  const Status status =
      allow_shared_memory(launch.function, plan.shared_bytes, mma_blocks_per_sm(kThreads), seen);
  return status == Status::kSuccess ? launch_kernel(launch, &p) : status;
}

}  // namespace sqk
