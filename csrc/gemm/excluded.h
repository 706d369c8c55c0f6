// Rows of the GEMM tables that a user has ruled out. Kernel ring: no torch, no GPU.
//
// SQK_WITHOUT_TILES is a list of rows, separated by commas, that are never launched: a tile that is
// broken on some GPU then costs nothing but its own speed, because every tile gives the same bits.
#pragma once

#include <string>

#include "gemm/tiles/tile.h"

namespace sqk {

constexpr const char* kExcludedVariable = "SQK_WITHOUT_TILES";

struct Excluded {
  uint64_t rows[kGemmTables] = {};  // a bit for each row
  std::string unknown;              // an entry that names no row: nothing is planned then

  bool has(GemmTable table, int32_t row) const {
    return (rows[static_cast<int>(table)] >> row & 1) != 0;
  }
};

// What a row is called in such a list: the table's name, a slash, and the tile's name with hyphens
// for its blanks.
std::string tile_id(const GemmTableView& table, int32_t row);

// What is ruled out, or nullptr; never freed. The environment is read at the first call.
const Excluded* excluded_tiles();

}  // namespace sqk
