// What the files of the mma.sync tiles for weights of 4 bits instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/kernels.h"
#include "gemm/tiles/tables.h"
#include "gemm/w4/mma.cuh"

namespace sqk {

template <TileKey kTile>
GemmLaunch w4_mma_entry() {
  static_assert(any_table_has(kTile), "no table has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  static_assert(t.k == kW4Group);
  return &launch_w4_mma<t.m, t.n, t.warps_m, t.warps_n, t.stages>;
}

}  // namespace sqk
