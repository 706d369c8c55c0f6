// What the files of the streaming tiles for experts instantiate. Kernel ring: no torch.
#pragma once

#include "gemm/grouped/kernels.h"
#include "gemm/grouped/stream.cuh"

namespace sqk {

template <TileKey kTile>
GroupedLaunch grouped_stream_entry() {
  static_assert(GroupedTiles::has(kTile), "the table has no row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  constexpr int kGroups = t.m / kGroupTokens;
  static_assert(t.n == kStreamChannels && t.m == kGroups * kGroupTokens);
  return &launch_grouped_stream<kGroups>;
}

}  // namespace sqk
