// What the files of the streaming tiles for 4-bit weights instantiate. Kernel ring: no torch.
#pragma once

#include "common/dtype.cuh"
#include "gemm/kernels.h"
#include "gemm/stream/kernel.cuh"
#include "gemm/tiles/tables.h"

namespace sqk {

template <TileKey kTile>
StreamKernels w4_stream_entry() {
  static_assert(any_table_has(kTile), "no table has a row with this tile");
  constexpr GemmTile t = tile_of(kTile);
  constexpr int kGroups = t.m / kGroupTokens;
  static_assert(t.n == kStreamChannels && t.m == kGroups * kGroupTokens);
  return [](DType x) -> StreamKernel {
    return visit(x, [](auto type) -> StreamKernel {
      return w4_stream_gemm_kernel<Element<decltype(type)>, kGroups>;
    });
  };
}

}  // namespace sqk
