// Declares the entries of the compiled GEMMs by experts, and their plan. Kernel ring: no torch.
//
// Each tile of the table has a file in gemm/instances/, which names the tile as the table does. A
// row without a file does not link; a file without a row does not compile.
#pragma once

#include "gemm/grouped/tiles.h"
#include "sqk/device.h"
#include "sqk/grouped.h"

namespace sqk {

// Launches the plan's kernels on the current GPU. The plan was made for these params.
using GroupedLaunch = Status (*)(const GroupedParams&, const Device&, const GroupedPlan&,
                                 cudaStream_t);

// instances/grouped_stream_*.cu, for all architectures.
template <TileKey kTile>
GroupedLaunch grouped_stream_entry();

// instances/grouped_mma_*.cu, for all architectures.
template <TileKey kTile>
GroupedLaunch grouped_mma_entry();

// instances/grouped_wgmma_*_sm90.cu, if the build has 9.0a (SQK_WITH_SM90).
template <TileKey kTile>
GroupedLaunch grouped_wgmma_entry();

struct GroupedStreamKind {
  using Entry = GroupedLaunch;
  static constexpr bool has(const GemmTile& tile) { return tile.kernel == GemmKernel::kStream; }
  template <TileKey kTile>
  static Entry entry() {
    return grouped_stream_entry<kTile>();
  }
};
struct GroupedMmaKind {
  using Entry = GroupedLaunch;
  static constexpr bool has(const GemmTile& tile) { return tile.kernel == GemmKernel::kMma; }
  template <TileKey kTile>
  static Entry entry() {
    return grouped_mma_entry<kTile>();
  }
};

struct GroupedWgmmaKind {
  using Entry = GroupedLaunch;
  static constexpr bool has(const GemmTile& tile) { return tile.kernel == GemmKernel::kWgmma; }
  template <TileKey kTile>
  static Entry entry() {
    return grouped_wgmma_entry<kTile>();
  }
};

// Whether a tensor map describes w_q. By the driver's manual, each stride must be a multiple of the
// one before.
constexpr bool has_map(const GroupedParams& params) {
  return params.experts == 1 || params.n == 1 || params.w_q_expert_stride % params.w_q_stride == 0;
}

// Of the shared memory of a wgmma kernel: where each expert's rows and tiles start.
constexpr int64_t expert_bytes(int64_t experts) { return 8 * (experts + 1); }

// Whether a streaming tile can compute the problem: one expert may have all rows.
constexpr bool grouped_stream_serves(int64_t tile_m, const GroupedParams& params) {
  return params.m <= tile_m;
}

// The plan for a GPU, without asking which one is current.
Status plan_grouped(const GroupedParams& params, const Device& device, GroupedPlan* plan);

// An upper bound of the tiles along m, of which each holds rows of one expert, or rows of none
// before the first or after the last one. Only the GPU knows how many rows each has.
constexpr int64_t most_grouped_tiles(const GroupedParams& params, int64_t tile_m) {
  const int64_t groups = params.experts + 2 < params.m ? params.experts + 2 : params.m;
  return (params.m - groups) / tile_m + groups;
}

}  // namespace sqk
