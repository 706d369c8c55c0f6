// Hopper's GEMM: CUTLASS's TMA and wgmma main loop, our epilogue. Kernel ring: no torch.
#pragma once

// A kernel may start before the previous one in the stream has ended: the warp that loads waits
// before its first load, and all others wait for what it loads.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gemm/epilogue/channels.cuh"
#include "gemm/epilogue/gated_tokens.cuh"
#include "gemm/kernels.h"
#include "gemm/wgmma/stream_k.cuh"

namespace sqk {

// The interface that CUTLASS's kernels need of an epilogue. The results go from registers to global
// memory, in whole sectors (epilogue/), without shared memory, which is all for the main loop.
template <bool kSwapAB, bool kGated>
class WgmmaEpilogue {
 public:
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementOutput = int32_t;
  using ElementAccumulator = int32_t;
  using ElementCompute = float;
  using ElementC = void;
  using ElementD = int32_t;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  using Arguments = Epilogue;
  using Params = Epilogue;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments,
                                                  void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE WgmmaEpilogue(const Params& params, const SharedStorage& = SharedStorage())
      : params_(params) {}

  // One warpgroup's part of a tile, 64 rows of accumulators at a time: warp w holds rows 16 w ...
  template <class Problem, class Tile, class Coordinates, class Engine, class Layout,
            class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(Problem, Tile tile, Coordinates coordinates,
                                 const cute::Tensor<Engine, Layout>& accumulators, TiledMma,
                                 Residue, int thread, char*) {
    constexpr int kRows = cute::size<0>(Tile{}), kColumns = cute::size<1>(Tile{});
    constexpr int kWarpgroups = cute::size(TiledMma{}) / 128;
    constexpr int kPerThread = kColumns / 2;  // accumulators of 64 rows
    constexpr int kParts = kRows / (64 * kWarpgroups);
    static_assert(decltype(cute::size(accumulators))::value == kParts * kPerThread);
    const int warpgroup = thread / 128, warp = thread % 128 / 32;
    const int row0 = cute::get<0>(coordinates) * kRows,
              column0 = cute::get<1>(coordinates) * kColumns;
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      // The warpgroups are side by side along the rows, and this pattern repeats.
      const int row = row0 + 64 * (part * kWarpgroups + warpgroup) + 16 * warp;
      int32_t acc[kPerThread];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPerThread; ++i) acc[i] = accumulators(part * kPerThread + i);
      if constexpr (kSwapAB) {
        store_channels<kColumns / 8>(params_, acc, row, column0);
      } else if constexpr (kGated) {
        store_gated_tokens<kColumns / 8>(params_, acc, row, column0);
      } else {
        store_tokens<kColumns / 8>(params_, acc, row, column0);
      }
    }
  }

 private:
  Params params_;
};

template <Schedule kSchedule>
struct WgmmaSchedule;
template <>
struct WgmmaSchedule<Schedule::kPingpong> {
  using Kernel = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
template <>
struct WgmmaSchedule<Schedule::kCooperative> {
  using Kernel = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
template <>
struct WgmmaSchedule<Schedule::kStreamK> {
  using Kernel = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Scheduler = StreamKWithTickets;
};

// The kernel of one tile, by numbers that people can read in a profile. "Rows" and "columns" are
// those of the instruction: tokens and channels, or vice versa.
template <int kM, int kN, int kK, int kStages, Schedule kSchedule, bool kSwapAB, int kClusterM,
          int kClusterN, bool kGated>
struct WgmmaTile {
  static constexpr bool kStreamK = kSchedule == Schedule::kStreamK;
  using TileShape =
      cute::Shape<cute::Int<kSwapAB ? kN : kM>, cute::Int<kSwapAB ? kM : kN>, cute::Int<kK>>;
  using Cluster = cute::Shape<cute::Int<kSwapAB ? kClusterN : kClusterM>,
                              cute::Int<kSwapAB ? kClusterM : kClusterN>, cute::_1>;
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16,
      int8_t, cutlass::layout::ColumnMajor, 16, int32_t, TileShape, Cluster,
      cutlass::gemm::collective::StageCount<kStages>,
      typename WgmmaSchedule<kSchedule>::Kernel>::CollectiveOp;
  using Store = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      WgmmaEpilogue<kSwapAB, kGated>>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop, Store,
                                           typename WgmmaSchedule<kSchedule>::Scheduler>;
};

template <class Tile>
struct WgmmaParams {
  typename Tile::Kernel::Params gemm;
  uint32_t* tickets;  // stream-K only; see stream_k.cuh
};

// CUTLASS's kernel under the name of its tile.
template <class Tile>
__global__ void __launch_bounds__(Tile::Kernel::MaxThreadsPerBlock, 1)
    wgmma_gemm_kernel(const __grid_constant__ WgmmaParams<Tile> params) {
  extern __shared__ char shared[];
  if constexpr (Tile::kStreamK) keep_tickets(params.tickets);
  typename Tile::Kernel()(params.gemm, shared);
}

template <TileKey kKey, bool kGated = false>
class WgmmaGemm {
  static constexpr GemmTile kTile = tile_of(kKey);
  static_assert(kTile.kernel == GemmKernel::kWgmma);
  static constexpr bool kSwap = kTile.swap_ab;
  static constexpr int kClusterBlocks = kTile.cluster_m * kTile.cluster_n;
  using Tile = WgmmaTile<kTile.m, kTile.n, kTile.k, kTile.stages, kTile.schedule, kSwap,
                         kTile.cluster_m, kTile.cluster_n, kGated>;
  using Kernel = typename Tile::Kernel;
  using Cluster = typename Tile::Cluster;
  static constexpr int kShared = Kernel::SharedStorageSize + (Tile::kStreamK ? kKeptBytes : 0);
  static_assert(kShared <= shared_bytes(kTile), "plan_gemm compares less with what the GPU has");

  static const void* function() { return reinterpret_cast<const void*>(&wgmma_gemm_kernel<Tile>); }

  static Status allow_memory() {
    static DevicesSeen seen;
    return allow_shared_memory(function(), kShared, 1, seen);
  }

  // How many clusters run at a time. This can be less than multiprocessors / cluster size, because
  // a GPC may have an odd number of multiprocessors or some disabled. 0: not known; CUTLASS then
  // assumes a number. Cached per device, because a plan and its launch must agree.
  static int active_clusters() {
    static std::atomic<int32_t> known[kMaxDevices];  // plus 1; 0: not asked yet
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
    if (const int32_t found = known[device].load(std::memory_order_relaxed)) return found - 1;
    KernelLaunch launch = {};
    launch.function = function();
    launch.grid = cluster();
    launch.block = Kernel::get_block_shape();
    launch.shared_bytes = kShared;
    launch.cluster = cluster();
    int count = 0;
    if (allow_memory() == Status::kSuccess) count = max_active_clusters(launch);
    known[device].store(count + 1, std::memory_order_relaxed);
    return count;
  }

  static dim3 cluster() { return dim3(cute::size<0>(Cluster{}), cute::size<1>(Cluster{})); }

  // CUTLASS's own check would refuse a k that is not a multiple of 16. TMA needs this only of
  // strides, and reads zeros beyond k.
  static typename Kernel::Arguments arguments(const GemmParams& p, const Device& device) {
    typename Kernel::Arguments a = {};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
    a.problem_shape = cute::make_shape(kSwap ? n : m, kSwap ? m : n, k, 1);
    const int64_t x_stride = stride(p, p.m, p.x_q_stride);
    const int64_t w_stride = stride(p, p.n, p.w_q_stride);
    a.mainloop.ptr_A = kSwap ? p.w_q : p.x_q;
    a.mainloop.dA = cute::make_stride(kSwap ? w_stride : x_stride, cute::_1{}, int64_t{0});
    a.mainloop.ptr_B = kSwap ? p.x_q : p.w_q;
    a.mainloop.dB = cute::make_stride(kSwap ? x_stride : w_stride, cute::_1{}, int64_t{0});
    a.epilogue = make_epilogue(p);
    a.hw_info.sm_count = device.sms;
    if constexpr (kClusterBlocks > 1) a.hw_info.max_active_clusters = active_clusters();
    if constexpr (kTile.schedule == Schedule::kStreamK) {
      // By default CUTLASS does not split tiles if the last wave is half full. Here plan_gemm has
      // already decided.
      a.scheduler.decomposition_mode = decltype(a.scheduler.decomposition_mode)::StreamK;
    }
    return a;
  }

  // A single row may have any stride, but a tensor map needs one that is at least as long as the
  // row.
  static int64_t stride(const GemmParams& p, int64_t rows, int64_t given) {
    return rows > 1 ? given : round_up(p.k, kGemmAlignment);
  }

  // If the driver refuses a tensor map, CUTLASS only prints a message and continues with an empty
  // one.
  static bool is_encoded(const cute::TmaDescriptor& map) {
    const cute::TmaDescriptor empty = {};
    return std::memcmp(&map, &empty, sizeof map) != 0;
  }

 public:
  static int64_t workspace_bytes(const GemmParams& p, const Device& device) {
    return static_cast<int64_t>(Kernel::get_workspace_size(arguments(p, device)));
  }

  static Status launch(const GemmParams& p, const Device& device, const GemmPlan& plan,
                       cudaStream_t stream) {
    const auto given = arguments(p, device);
    uint32_t* tickets = nullptr;
    if constexpr (Tile::kStreamK) {
      // The plan may have been made in a context with other multiprocessors.
      if (static_cast<int64_t>(Kernel::get_workspace_size(given)) > p.workspace_bytes) {
        return Status::kWorkspaceTooSmall;
      }
      if (stream_k_tickets(plan.tiles, device.sms) <= kTickets) tickets = find_tickets(stream);
    }
    const bool clears = Tile::kStreamK && tickets == nullptr;
    // Clears the counters in the workspace.
    if (clears &&
        Kernel::initialize_workspace(given, p.workspace, stream) != cutlass::Status::kSuccess) {
      return Status::kUnsupportedShape;
    }
    WgmmaParams<Tile> params{Kernel::to_underlying_arguments(given, p.workspace), tickets};
    if (!is_encoded(*params.gemm.mainloop.tma_load_a.get_tma_descriptor()) ||
        !is_encoded(*params.gemm.mainloop.tma_load_b.get_tma_descriptor())) {
      return Status::kInvalidArgument;
    }
    KernelLaunch launch = {};
    launch.function = function();
    launch.grid = Kernel::get_grid_shape(params.gemm);
    launch.block = Kernel::get_block_shape();
    launch.shared_bytes = kShared;
    launch.stream = stream;
    launch.cluster = cluster();
    launch.overlap = plan.overlap && !clears;  // only kernels are sure to overlap with kernels
    const Status status = allow_memory();
    return status == Status::kSuccess ? launch_kernel(launch, &params) : status;
  }
};

}  // namespace sqk
