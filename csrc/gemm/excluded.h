// Rows of the GEMM tables that a user has ruled out. Kernel ring: no torch, no GPU.
//
// SQK_WITHOUT_TILES is a comma-separated list of rows that are never launched. Excluding a tile
// that is broken on some GPU costs only its speed, because every tile gives the same bits.
#pragma once

#include <string>

#include "gemm/tiles/tile.h"

namespace sqk {

constexpr const char* kExcludedVariable = "SQK_WITHOUT_TILES";

struct Excluded {
  uint64_t rows[kGemmTables] = {};  // one bit per row
  std::string unknown;              // an entry that names no row; every plan then fails

  bool has(GemmTable table, int32_t row) const {
    return (rows[static_cast<int>(table)] >> row & 1) != 0;
  }
};

// The name of a row in such a list: the table's name, a slash, and the tile's name with hyphens
// instead of blanks.
std::string tile_id(const GemmTableView& table, int32_t row);

// The excluded rows, or nullptr if there are none; never freed. The first call reads the
// environment.
const Excluded* excluded_tiles();

}  // namespace sqk
