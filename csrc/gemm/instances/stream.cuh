// What the files of the streaming tiles instantiate. Kernel ring: no torch.
#pragma once

#include "common/dtype.cuh"
#include "gemm/kernels.h"
#include "gemm/stream/kernel.cuh"
#include "gemm/tiles/sm80.h"
#include "gemm/tiles/sm89.h"
#include "gemm/tiles/sm90.h"

namespace sqk {

// Rows that differ in their warps and rates alone share their kernels.
template <TileKey kTile>
StreamKernels stream_entry() {
  static_assert(Sm80Tiles::has(kTile) || Sm89Tiles::has(kTile) || Sm90Tiles::has(kTile),
                "no table has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  constexpr int kGroups = t.m / kGroupTokens;
  static_assert(t.n == kStreamChannels && t.m == kGroups * kGroupTokens);
  return [](DType x) -> StreamKernel {
    return visit(x, [](auto type) -> StreamKernel {
      return stream_gemm_kernel<Element<decltype(type)>, kGroups>;
    });
  };
}

}  // namespace sqk
