// Tiles for Ada that only a tuning build compiles: no rule names them before a GPU has said that
// they are worth it; the tuner then prints the row to move to table_sm89.h. Kernel ring: no torch.
#pragma once

#include <iterator>

#include "gemm/tiles/tile.h"

namespace sqk {

constexpr GemmTile kSm89Candidates[] = {
    {"32x128x64", GemmKernel::kMma, 32, 128, 64, 1, 4, 4, Schedule::kNone, false, 1, 1, 8, 60,
     "40 KiB, two blocks per SM; half the tiles of 32x64 for wide layers"},
    {"128x64x64", GemmKernel::kMma, 128, 64, 64, 2, 2, 4, Schedule::kNone, false, 1, 1, 8, 80,
     "48 KiB, two blocks per SM: narrow layers and many tokens"},
    {"128x128x128", GemmKernel::kMma, 128, 128, 128, 2, 4, 3, Schedule::kNone, false, 1, 1, 4, 90,
     "96 KiB, one block of 8 warps: half the barriers of k = 64"},
};
static_assert(tiles_hold(kSm89Candidates, std::size(kSm89Candidates), 99 * 1024),
              "a candidate breaks a rule of tile.h");

}  // namespace sqk
