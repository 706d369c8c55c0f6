// Hopper's GEMM by experts. Kernel ring: no torch.
//
// Two warpgroups multiply 64 rows of the instruction each; a warp of its own requests x_q and w_q
// by TMA. Blocks are persistent: only they know how many tiles there are, and the ring of stages
// continues from one tile to the next. Tiles never cross experts, so that all rows of a tile have
// one weight. Rows that `rows` names are first copied next to each other (gather_sm90.cu).
#pragma once

#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "gemm/grouped/gather.h"
#include "gemm/grouped/kernels.h"
#include "gemm/grouped/wgmma_multiply.cuh"

namespace sqk {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_wgmma_gemm_kernel(const __grid_constant__ GroupedWgmmaParams p) {
  extern __shared__ __align__(1024) uint8_t grouped_stages[];
  const uint32_t shared = shared_address(grouped_stages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      const uint32_t barrier = shared + Tile::kBarriersAt + 16 * i;
      init_barrier(barrier, 1);                          // full
      init_barrier(barrier + 8, Tile::kConsumers / 32);  // empty
    }
    publish_barriers();
  }
  if (threadIdx.x == Tile::kConsumers) {
    prefetch_map(p.x);
    prefetch_map(p.w);
  }
  wait_for_previous_kernel();
  GroupedExperts<Tile> experts(p, grouped_stages);
  experts.find();
  __syncthreads();
  if (threadIdx.x < Tile::kConsumers) {
    if constexpr (Tile::kGivesRegisters) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 240;" ::: "memory");
    }
    GroupedConsumer<Tile>(p, shared).run(experts);
  } else {
    if constexpr (Tile::kGivesRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;" ::: "memory");
    }
    if (threadIdx.x == Tile::kConsumers) GroupedLoader<Tile>(p, shared).run(experts);
  }
}

// --- launch ------------------------------------------------------------------------------------

template <TileKey kKey>
class GroupedWgmma {
  static constexpr GemmTile kTile = tile_of(kKey);
  using Tile = GroupedWgmmaTile<kTile.m, kTile.n, kTile.stages, kTile.swap_ab>;
  static_assert(kTile.kernel == GemmKernel::kWgmma && kTile.k == Tile::kK &&
                kTile.schedule == Schedule::kCooperative && kTile.cluster_m == 1 &&
                kTile.cluster_n == 1);
  static_assert(Tile::shared_bytes(kMaxExperts) <= shared_bytes(kTile) + expert_bytes(kMaxExperts),
                "plan_grouped compares less with what the GPU has");

  // As in mma/kernel.cuh: these tokens at K = 8192 take 16 MiB of L2.
  static constexpr int32_t kRasterTokens = 2048;

  // A single row may have any stride, but a map needs one that is at least as long as the row.
  static int64_t stride(int64_t rows, int64_t columns, int64_t given) {
    return rows > 1 ? given : round_up(columns, kGemmAlignment);
  }

  static Status encode(const GroupedParams& params, GroupedWgmmaParams* p) {
    ByteMatrix x = {params.x_q, params.m, params.k, stride(params.m, params.k, params.x_q_stride)};
    if (params.rows != nullptr) {
      x.base = params.workspace;
      x.stride = gathered_stride(params.k);
    }
    const Status status =
        encode_matrix(&p->x, x, Tile::kTokens, Tile::kK, CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != Status::kSuccess) return status;
    ByteMatrix w = {params.w_q, params.n, params.k, stride(params.n, params.k, params.w_q_stride)};
    const int64_t distance = params.experts > 1 ? params.w_q_expert_stride : w.rows * w.stride;
    if (params.n == 1) w.stride = distance;
    return encode_matrices(&p->w, w, params.experts, distance, Tile::kChannels, Tile::kK,
                           CU_TENSOR_MAP_SWIZZLE_128B);
  }

 public:
  static Status launch(const GroupedParams& params, const Device&, const GroupedPlan& plan,
                       cudaStream_t stream) {
    const int64_t n_tiles = divide_up(params.n, int64_t{Tile::kChannels});
    // Positions of rows and columns, and the number of units, are 32-bit.
    if (params.m > INT32_MAX - Tile::kTokens || params.x_rows > INT32_MAX ||
        params.n > INT32_MAX - Tile::kChannels ||
        most_grouped_tiles(params, Tile::kTokens) * n_tiles > INT32_MAX) {
      return Status::kUnsupportedShape;
    }
    GroupedWgmmaParams p = {};
    Status status = encode(params, &p);
    if (status != Status::kSuccess) return status;
    p.offsets = params.offsets;
    p.experts = static_cast<int32_t>(params.experts);
    p.steps = static_cast<int32_t>(divide_up(params.k, int64_t{Tile::kK}));
    p.n_tiles = static_cast<int32_t>(n_tiles);
    p.raster = kRasterTokens / Tile::kTokens;
    p.epilogue = make_grouped_epilogue(params);
    KernelLaunch launch = {};
    launch.function = reinterpret_cast<const void*>(&grouped_wgmma_gemm_kernel<Tile>);
    launch.grid = dim3(static_cast<unsigned>(plan.blocks));
    launch.block = dim3(Tile::kThreads);
    launch.shared_bytes = Tile::shared_bytes(params.experts);
    launch.stream = stream;
    launch.overlap = plan.overlap;
    static DevicesSeen seen;
    status = allow_shared_memory(launch.function, Tile::shared_bytes(kMaxExperts), 1, seen);
    if (status == Status::kSuccess && params.rows != nullptr) {
      status = gather_rows(params, plan.overlap, stream);
    }
    return status == Status::kSuccess ? launch_kernel(launch, &p) : status;
  }
};

}  // namespace sqk
