// The mma.sync GEMMs of both tables; rows of the same numbers share a kernel. Kernel ring: no
// torch.
#include <cstddef>
#include <iterator>
#include <utility>

#include "gemm/kernels.h"
#include "gemm/mma_kernel.cuh"
#include "gemm/table_sm80.h"
#include "gemm/table_sm89.h"

namespace sqk {
namespace {

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
GemmLaunch find_launch(int32_t tile, std::index_sequence<kRows...>) {
  static constexpr GemmLaunch kLaunches[] = {launch_of_row<kTiles, kRows>()...};
  return tile >= 0 && tile < static_cast<int32_t>(sizeof...(kRows)) ? kLaunches[tile] : nullptr;
}

}  // namespace

GemmLaunch mma_launch(GemmTable table, int32_t tile) {
  switch (table) {
    case GemmTable::kSm80:
      return find_launch<kSm80Tiles>(tile, std::make_index_sequence<std::size(kSm80Tiles)>());
    case GemmTable::kSm89:
      return find_launch<kSm89Tiles>(tile, std::make_index_sequence<std::size(kSm89Tiles)>());
    case GemmTable::kSm90:
      return nullptr;
  }
  return nullptr;
}

}  // namespace sqk
