// What the files of Hopper's tiles for weights of 4 bits instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/sm90.h"
#include "gemm/w4/wgmma.cuh"

namespace sqk {

template <TileKey kTile>
WgmmaEntry w4_wgmma_entry() {
  static_assert(Sm90Tiles::has(kTile), "tiles/sm90.h has no row with this tile");
  return {&W4WgmmaGemm<kTile>::launch, nullptr};  // plan_gemm knows the workspace
}

}  // namespace sqk
