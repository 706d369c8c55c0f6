// Finds the compiled kernels of a table's row. Kernel ring: no torch.
#pragma once

#include <utility>

#include "gemm/kernels.h"
#include "gemm/tiles/tables.h"

namespace sqk {

// The kinds of kernels, for find_entry: `has` tells which rows have one.
struct StreamKind {
  using Entry = StreamKernels;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kStream && !tile.w4_only;
  }
  template <TileKey kTile>
  static Entry entry() {
    return stream_entry<kTile>();
  }
};
struct MmaKind {
  using Entry = GemmLaunch;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kMma && !tile.w4_only;
  }
  template <TileKey kTile>
  static Entry entry() {
    return mma_entry<kTile>();
  }
};
struct WgmmaKind {
  using Entry = WgmmaEntry;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kWgmma && !tile.w4_only;
  }
  template <TileKey kTile>
  static Entry entry() {
    return wgmma_entry<kTile>();
  }
};

// Of the tiles that have a gated kernel besides.
struct GatedMmaKind : MmaKind {
  static constexpr bool has(const GemmTile& tile) { return MmaKind::has(tile) && tile.gated; }
  template <TileKey kTile>
  static Entry entry() {
    return gated_mma_entry<kTile>();
  }
};
struct GatedWgmmaKind : WgmmaKind {
  static constexpr bool has(const GemmTile& tile) { return WgmmaKind::has(tile) && tile.gated; }
  template <TileKey kTile>
  static Entry entry() {
    return gated_wgmma_entry<kTile>();
  }
};

// Of the tiles that have a kernel for weights of 4 bits.
struct W4StreamKind {
  using Entry = StreamKernels;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kStream && tile.w4;
  }
  template <TileKey kTile>
  static Entry entry() {
    return w4_stream_entry<kTile>();
  }
};
struct W4MmaKind {
  using Entry = GemmLaunch;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kMma && tile.w4;
  }
  template <TileKey kTile>
  static Entry entry() {
    return w4_mma_entry<kTile>();
  }
};
struct W4WgmmaKind {
  using Entry = WgmmaEntry;
  static constexpr bool has(const GemmTile& tile) {
    return tile.kernel == GemmKernel::kWgmma && tile.w4;
  }
  template <TileKey kTile>
  static Entry entry() {
    return w4_wgmma_entry<kTile>();
  }
};

template <typename Kind, typename Table, size_t kRow>
typename Kind::Entry entry_of_row() {
  constexpr GemmTile kTile = Table::kTiles[kRow];
  if constexpr (Kind::has(kTile)) {
    return Kind::template entry<key_of(kTile)>();
  } else {
    return {};
  }
}

template <typename Kind, typename Table, size_t... kRows>
typename Kind::Entry find_entry(int32_t row, std::index_sequence<kRows...>) {
  using Find = typename Kind::Entry (*)();
  static constexpr Find kFind[] = {&entry_of_row<Kind, Table, kRows>...};
  return kFind[row]();
}

template <typename Kind, typename Table>
typename Kind::Entry find_entry(int32_t row) {
  return find_entry<Kind, Table>(row, std::make_index_sequence<Table::kTiles.size()>());
}

// The kernels of a row, or an empty entry if the row is of another kind.
template <typename Kind>
typename Kind::Entry find_entry(GemmTable table, int32_t row) {
#define SQK_CASE(table, text) \
  case GemmTable::k##table:   \
    return find_entry<Kind, table##Tiles>(row);
  switch (table) { SQK_GEMM_TABLES(SQK_CASE) }
#undef SQK_CASE
  return {};
}

}  // namespace sqk
