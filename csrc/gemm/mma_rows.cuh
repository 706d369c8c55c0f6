// The launchers of a list of tiles, by place; rows of the same numbers share a kernel. Kernel ring:
// no torch.
#pragma once

#include <cstddef>
#include <iterator>
#include <utility>

#include "gemm/kernels.h"
#include "gemm/mma/kernel.cuh"

namespace sqk {

template <const auto& kTiles, size_t kRow>
constexpr GemmLaunch launch_of_row() {
  constexpr GemmTile kTile = kTiles[kRow];
  if constexpr (kTile.kernel == GemmKernel::kMma) {
    return &launch_mma<kTile.m, kTile.n, kTile.k, kTile.warps_m, kTile.warps_n, kTile.stages>;
  } else {
    return nullptr;
  }
}

template <const auto& kTiles, size_t... kRows>
GemmLaunch find_launch(int64_t row, std::index_sequence<kRows...>) {
  static constexpr GemmLaunch kLaunches[] = {launch_of_row<kTiles, kRows>()...};
  return row >= 0 && row < static_cast<int64_t>(sizeof...(kRows)) ? kLaunches[row] : nullptr;
}

// nullptr for rows of another kind, and outside the list.
template <const auto& kTiles>
GemmLaunch find_launch(int64_t row) {
  return find_launch<kTiles>(row, std::make_index_sequence<std::size(kTiles)>());
}

}  // namespace sqk
