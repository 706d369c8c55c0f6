// What the files of the mma.sync tiles instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/kernels.h"
#include "gemm/mma/kernel.cuh"
#include "gemm/tiles/sm80.h"
#include "gemm/tiles/sm89.h"

namespace sqk {

// Rows of both tables that differ in their splits and rates alone share a kernel.
template <TileKey kTile>
GemmLaunch mma_entry() {
  static_assert(Sm80Tiles::has(kTile) || Sm89Tiles::has(kTile),
                "neither tiles/sm80.h nor tiles/sm89.h has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  return &launch_mma<t.m, t.n, t.k, t.warps_m, t.warps_n, t.stages>;
}

}  // namespace sqk
