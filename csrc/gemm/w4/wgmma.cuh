// Hopper's GEMM with weights of 4 bits. Kernel ring: no torch.
//
// Channels are the rows of the instruction: wgmma takes its first operand from registers, so that
// the weights go from shared memory to the tensor cores without a way back. Two warpgroups of 64
// channels each unpack a group of k while the tensor cores multiply the one before; a warp of its
// own requests x_q, w_q and w_group by TMA. Blocks are persistent: the ring of stages continues
// from one unit of work to the next. Where there are too few tiles for all SMs, blocks share a
// tile's k, as in mma/kernel.cuh.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "common/tickets.h"
#include "gemm/kernels.h"
#include "gemm/w4/wgmma_load.cuh"
#include "gemm/w4/wgmma_multiply.cuh"

namespace sqk {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    w4_wgmma_gemm_kernel(const __grid_constant__ W4WgmmaParams p) {
  extern __shared__ __align__(1024) uint8_t w4_stages[];
  const uint32_t shared = shared_address(w4_stages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      const uint32_t barrier = shared + Tile::kBarriersAt + 16 * i;
      init_barrier(barrier, 1);                                           // full
      init_barrier(barrier + 8, Tile::kConsumers / 32 * Tile::kCluster);  // empty
    }
    publish_barriers();
  }
  // No block of a cluster may write to another one that has not started or has ended.
  if constexpr (Tile::kCluster > 1) {
    sync_cluster();
  } else {
    __syncthreads();
  }
  const uint32_t units = static_cast<uint32_t>(p.m_tiles) * p.n_clusters * p.splits;
  if (threadIdx.x < Tile::kConsumers) {
    if constexpr (Tile::kGivesRegisters) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 240;" ::: "memory");
    }
    W4Consumer<Tile>(p, shared, w4_stages).run(units);
  } else {
    if constexpr (Tile::kGivesRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;" ::: "memory");
    }
    if (threadIdx.x == Tile::kConsumers) W4Loader<Tile>(p, shared).run(units);
  }
  if constexpr (Tile::kCluster > 1) {
    __syncwarp();
    sync_cluster();
  }
}

// --- launch ------------------------------------------------------------------------------------

template <TileKey kKey>
class W4WgmmaGemm {
  static constexpr GemmTile kTile = tile_of(kKey);
  static_assert(kTile.kernel == GemmKernel::kWgmma && kTile.swap_ab && kTile.k == kW4Group &&
                kTile.schedule == Schedule::kCooperative && kTile.cluster_m == 1);
  using Tile = W4WgmmaTile<kTile.m, kTile.stages, kTile.cluster_n>;
  static constexpr GemmTile w4_only(GemmTile tile) {  // a key leaves this out
    tile.w4 = tile.w4_only = true;
    return tile;
  }
  static_assert(kTile.n == Tile::kChannels && Tile::kShared <= shared_bytes(w4_only(kTile)),
                "plan_gemm compares less with what the GPU has");

  // As in mma/kernel.cuh: these tokens at K = 8192 take 16 MiB of L2.
  static constexpr int32_t kRasterTokens = 2048;

  static const void* function() {
    return reinterpret_cast<const void*>(&w4_wgmma_gemm_kernel<Tile>);
  }

  // A single row may have any stride, but a map needs one that is at least as long as the row.
  static int64_t stride(int64_t rows, int64_t columns, int64_t given) {
    return rows > 1 ? given : round_up(columns, kGemmAlignment);
  }

  static Status encode(const GemmParams& params, W4WgmmaParams* p) {
    const int64_t groups = w4_groups(params.k), bytes = groups * kW4Bytes;
    const ByteMatrix x = {params.x_q, params.m, params.k,
                          stride(params.m, params.k, params.x_q_stride)};
    const ByteMatrix w = {params.w_q, params.n, bytes, stride(params.n, bytes, params.w_q_stride)};
    Status status = encode_matrix(&p->x, x, Tile::kTokens / Tile::kCluster, kW4Group,
                                  CU_TENSOR_MAP_SWIZZLE_128B);
    if (status == Status::kSuccess) {
      status = encode_matrix(&p->w, w, Tile::kChannels, kW4Bytes, CU_TENSOR_MAP_SWIZZLE_NONE);
    }
    if (status == Status::kSuccess) {
      status = encode_vector(&p->group, params.w_group, groups * params.n, Tile::kChannels);
    }
    return status;
  }

  // How many clusters the GPU runs at a time: fewer than its multiprocessors could hold if a GPC
  // has an odd number of them. A block that starts only when another one ends would double the
  // time.
  static int64_t at_a_time(KernelLaunch launch, const Device& device) {
    const int64_t most = std::max(1, device.sms / Tile::kCluster);
    if constexpr (Tile::kCluster > 1) {
      static std::atomic<int32_t> known[kMaxDevices];  // 0: not asked yet
      int index = 0;
      if (cudaGetDevice(&index) != cudaSuccess || index >= kMaxDevices) return most;
      int32_t found = known[index].load(std::memory_order_relaxed);
      if (found == 0) {
        launch.grid = launch.cluster;
        found = max_active_clusters(launch);
        if (found == 0) found = static_cast<int32_t>(most);
        known[index].store(found, std::memory_order_relaxed);
      }
      return std::min<int64_t>(found, most);
    }
    return most;
  }

 public:
  static Status launch(const GemmParams& params, const Device& device, const GemmPlan& plan,
                       cudaStream_t stream) {
    const int64_t groups = w4_groups(params.k);
    const int64_t m_tiles = divide_up(params.m, Tile::kTokens);
    const int64_t n_clusters = divide_up(params.n, Tile::kChannels * Tile::kCluster);
    const int64_t splits = std::clamp<int64_t>(plan.splits, 1, groups);
    const int64_t clusters = m_tiles * n_clusters, tiles = clusters * Tile::kCluster;
    // Positions of rows, columns and elements of w_group, and the number of units, are 32-bit.
    if (m_tiles * Tile::kTokens > INT32_MAX || groups * params.n > INT32_MAX - Tile::kChannels ||
        n_clusters * Tile::kChannels * Tile::kCluster > INT32_MAX || tiles * splits > INT32_MAX) {
      return Status::kUnsupportedShape;
    }
    W4WgmmaParams p = {};
    Status status = encode(params, &p);
    if (status != Status::kSuccess) return status;
    p.groups = static_cast<int32_t>(groups);
    p.m_tiles = static_cast<int32_t>(m_tiles);
    p.n_clusters = static_cast<int32_t>(n_clusters);
    p.raster =
        static_cast<int32_t>(divide_up(m_tiles, divide_up(m_tiles, kRasterTokens / Tile::kTokens)));
    p.splits = static_cast<int32_t>(splits);
    p.weights_first = plan.overlap && plan.weights_first;
    p.epilogue = make_epilogue(params);
    bool clears = false;
    if (splits > 1) {
      const int64_t counters = split_counter_bytes(tiles);
      p.partials = reinterpret_cast<int4*>(static_cast<int8_t*>(params.workspace) + counters);
      p.tickets = tiles <= kTickets ? find_tickets(stream) : nullptr;
      clears = p.tickets == nullptr;
      if (clears) {
        p.tickets = static_cast<uint32_t*>(params.workspace);
        status = status_from_call(cudaMemsetAsync(p.tickets, 0, counters, stream));
        if (status != Status::kSuccess) return status;
      }
    }
    KernelLaunch launch = {};
    launch.function = function();
    launch.block = dim3(Tile::kThreads);
    launch.shared_bytes = Tile::kShared;
    launch.stream = stream;
    launch.cluster = dim3(Tile::kCluster);
    launch.overlap = plan.overlap && !clears;  // only kernels are sure to overlap with kernels
    static DevicesSeen seen;
    status = allow_shared_memory(launch.function, Tile::kShared, 1, seen);
    if (status != Status::kSuccess) return status;
    const int64_t blocks = std::min(clusters * splits, at_a_time(launch, device)) * Tile::kCluster;
    launch.grid = dim3(static_cast<unsigned>(blocks));
    return launch_kernel(launch, &p);
  }
};

}  // namespace sqk
