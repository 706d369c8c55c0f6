// Tiles for A100 that only a tuning build compiles: no rule names them before a GPU has said that
// they are worth it; the tuner then prints the row to move to table_sm80.h. Kernel ring: no torch.
#pragma once

#include <iterator>

#include "gemm/tiles/tile.h"

namespace sqk {

constexpr GemmTile kSm80Candidates[] = {
    {"16x128x128", GemmKernel::kMma, 16, 128, 128, 1, 4, 4, Schedule::kNone, false, 1, 1, 8, 45,
     "72 KiB, two blocks per SM: half the tiles of 16x64, each draws x_q for twice the channels"},
    {"32x128x128", GemmKernel::kMma, 32, 128, 128, 1, 4, 4, Schedule::kNone, false, 1, 1, 8, 60,
     "80 KiB, two blocks per SM; warps of 32x32 read x_q half as often as those of 32x64"},
    {"64x64x128 5 stages", GemmKernel::kMma, 64, 64, 128, 2, 2, 5, Schedule::kNone, false, 1, 1, 8,
     65, "80 KiB instead of 64: a quarter more in flight"},
    {"64x256x64", GemmKernel::kMma, 64, 256, 64, 1, 4, 4, Schedule::kNone, false, 1, 1, 4, 80,
     "80 KiB, two blocks per SM; warps of 64x64 for 64 tokens"},
    {"128x64x128", GemmKernel::kMma, 128, 64, 128, 2, 2, 3, Schedule::kNone, false, 1, 1, 8, 75,
     "72 KiB, two blocks per SM: narrow layers and many tokens"},
    {"128x128x128", GemmKernel::kMma, 128, 128, 128, 2, 4, 4, Schedule::kNone, false, 1, 1, 4, 85,
     "128 KiB, one block of 8 warps: half the barriers of k = 64"},
    {"256x128x64", GemmKernel::kMma, 256, 128, 64, 4, 2, 4, Schedule::kNone, false, 1, 1, 1, 88,
     "128x256 with tokens and channels exchanged: other waves"},
    {"stream 8x16 8 warps", GemmKernel::kStream, 8, 16, 128, 1, 8, 0, Schedule::kNone, false, 1, 1,
     1, 50, "two blocks per SM: one reads on while the other adds up and stores"},
};
static_assert(tiles_hold(kSm80Candidates, std::size(kSm80Candidates), 163 * 1024),
              "a candidate breaks a rule of tile.h");

}  // namespace sqk
