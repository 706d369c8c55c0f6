// What the files of the mma.sync tiles for experts instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/grouped/kernels.h"
#include "gemm/grouped/mma.cuh"

namespace sqk {

template <TileKey kTile>
GroupedLaunch grouped_mma_entry() {
  static_assert(GroupedTiles::has(kTile), "the table has no row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  return &launch_grouped_mma<t.m, t.n, t.k, t.warps_m, t.warps_n, t.stages>;
}

}  // namespace sqk
