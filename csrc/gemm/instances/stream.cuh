// What the files of the streaming tiles instantiate. Kernel ring: no torch.
#pragma once

#include "common/dtype.cuh"
#include "gemm/kernels.h"
#include "gemm/stream/kernel.cuh"
#include "gemm/tiles/tables.h"

namespace sqk {

// Rows that differ in their warps and rates alone share their kernels.
template <TileKey kTile>
StreamKernels stream_entry() {
  static_assert(any_table_has(kTile), "no table has a row with this tile");
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
