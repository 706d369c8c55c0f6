// What the files of Hopper's tiles instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/sm90.h"
#include "gemm/wgmma/kernel.cuh"

namespace sqk {

template <TileKey kTile>
WgmmaEntry wgmma_entry() {
  static_assert(Sm90Tiles::has(kTile), "tiles/sm90.h has no row with this tile");
  return {&WgmmaGemm<kTile>::launch, &WgmmaGemm<kTile>::workspace_bytes};
}

template <TileKey kTile>
WgmmaEntry gated_wgmma_entry() {
  static_assert(Sm90Tiles::has(kTile), "tiles/sm90.h has no row with this tile");
  using Gemm = WgmmaGemm<kTile, true>;
  return {&Gemm::launch, &Gemm::workspace_bytes};
}

}  // namespace sqk
