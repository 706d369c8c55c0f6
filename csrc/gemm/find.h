// Finds the compiled kernels of a table's row. Kernel ring: no torch.
#pragma once

#include <type_traits>
#include <utility>

#include "gemm/kernels.h"
#include "gemm/tiles/tables.h"

namespace sqk {

// The kinds of kernels, for find_entry.
struct StreamKind {
  using Entry = StreamKernels;
  static constexpr GemmKernel kKernel = GemmKernel::kStream;
  template <TileKey kTile>
  static Entry entry() {
    return stream_entry<kTile>();
  }
};
struct MmaKind {
  using Entry = GemmLaunch;
  static constexpr GemmKernel kKernel = GemmKernel::kMma;
  template <TileKey kTile>
  static Entry entry() {
    return mma_entry<kTile>();
  }
};
struct WgmmaKind {
  using Entry = WgmmaEntry;
  static constexpr GemmKernel kKernel = GemmKernel::kWgmma;
  template <TileKey kTile>
  static Entry entry() {
    return wgmma_entry<kTile>();
  }
};

// Of the tiles that have a gated kernel besides.
struct GatedMmaKind : MmaKind {
  template <TileKey kTile>
  static Entry entry() {
    return gated_mma_entry<kTile>();
  }
};
struct GatedWgmmaKind : WgmmaKind {
  template <TileKey kTile>
  static Entry entry() {
    return gated_wgmma_entry<kTile>();
  }
};
template <typename Kind>
constexpr bool kIsGated =
    std::is_same_v<Kind, GatedMmaKind> || std::is_same_v<Kind, GatedWgmmaKind>;

template <typename Kind, typename Table, size_t kRow>
typename Kind::Entry entry_of_row() {
  constexpr GemmTile kTile = Table::kTiles[kRow];
  if constexpr (kTile.kernel == Kind::kKernel && (kTile.gated || !kIsGated<Kind>)) {
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
