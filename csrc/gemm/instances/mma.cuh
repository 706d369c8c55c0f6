// What the files of the mma.sync tiles instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/kernels.h"
#include "gemm/mma/kernel.cuh"
#include "gemm/tiles/tables.h"

namespace sqk {

// Rows of several tables that differ in their splits and rates alone share a kernel.
template <TileKey kTile>
GemmLaunch mma_entry() {
  static_assert(any_table_has(kTile), "no table has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  return &launch_mma<t.m, t.n, t.k, t.warps_m, t.warps_n, t.stages, false>;
}

template <TileKey kTile>
GemmLaunch gated_mma_entry() {
  static_assert(any_table_has(kTile), "no table has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  return &launch_mma<t.m, t.n, t.k, t.warps_m, t.warps_n, t.stages, true>;
}

}  // namespace sqk
