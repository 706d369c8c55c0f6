// All tables of tiles, and which of them serves a GPU. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/sm80.h"
#include "gemm/tiles/sm89.h"
#include "gemm/tiles/sm90.h"

namespace sqk {

// A table of SQK_GEMM_TABLES whose file is not included above does not compile.
#define SQK_VIEW(table, text) &k##table##Table,
constexpr const GemmTableView* kGemmTableViews[] = {SQK_GEMM_TABLES(SQK_VIEW)};
#undef SQK_VIEW

// Whether a row of any table is compiled to this kernel.
#define SQK_HAS(table, text) || table##Tiles::has(key)
constexpr bool any_table_has(TileKey key) { return false SQK_GEMM_TABLES(SQK_HAS); }
#undef SQK_HAS

constexpr GemmTable table_of(const Device& device) {
  if (device.wgmma) return GemmTable::kSm90;
  // A100's tiles need two blocks of 80 KiB on an SM, or one of 96 KiB, so the shared memory decides
  // and not the GPU's name.
  return device.shared_bytes >= 160 * 1024 ? GemmTable::kSm80 : GemmTable::kSm89;
}

}  // namespace sqk
