// What the files of Hopper's tiles for experts instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/grouped/kernels.h"
#include "gemm/grouped/wgmma.cuh"

namespace sqk {

template <TileKey kTile>
GroupedLaunch grouped_wgmma_entry() {
  static_assert(GroupedTiles::has(kTile), "the table has no row with this tile");
  return &GroupedWgmma<kTile>::launch;
}

}  // namespace sqk
