// Tiles for Hopper that only a tuning build compiles: no rule names them before a GPU has said that
// they are worth it; the tuner then prints the row to move to table_sm90.h. Kernel ring: no torch.
#pragma once

#include <iterator>

#include "gemm/tiles/tile.h"

namespace sqk {

// Each kWgmma row has a file, instances/tuning_*_sm90.cu, which names it.
constexpr GemmTile kSm90Candidates[] = {
    {"64x256x128", GemmKernel::kWgmma, 64, 256, 128, 0, 0, 5, Schedule::kPingpong, false, 2, 1, 1,
     75, "65 to 128 tokens of wide layers: half the tiles of 64x128, x_q drawn half as often"},
    {"128x128x128 1x1", GemmKernel::kWgmma, 128, 128, 128, 0, 0, 7, Schedule::kPingpong, false, 1,
     1, 1, 80, "no cluster: any SM takes any tile, odd numbers of them too; more from L2"},
    {"128x128x128 1x2", GemmKernel::kWgmma, 128, 128, 128, 0, 0, 7, Schedule::kPingpong, false, 1,
     2, 1, 80, "the pair shares the tokens: one row of tiles (65 to 128 tokens) is no waste"},
    {"128x192x128", GemmKernel::kWgmma, 128, 192, 128, 0, 0, 5, Schedule::kCooperative, false, 2, 1,
     1, 85, "between 128x128 and 128x256: fills other waves, and a stage more is in flight"},
    {"128x256x128 2x2", GemmKernel::kWgmma, 128, 256, 128, 0, 0, 4, Schedule::kCooperative, false,
     2, 2, 1, 90, "four share both operands: 24 bytes from L2 per 4096 MACs; GPCs may not divide"},
    {"128x256x128 1x1", GemmKernel::kWgmma, 128, 256, 128, 0, 0, 4, Schedule::kCooperative, false,
     1, 1, 1, 85, "no cluster: nobody waits for a partner; 48 bytes from L2 per 4096 MACs"},
    {"64x64x256 swap 1x2", GemmKernel::kWgmma, 64, 64, 256, 0, 0, 7, Schedule::kPingpong, true, 1,
     2, 1, 60, "the pair shares the tokens, which are half of what a tile loads"},
    {"64x128x128 swap", GemmKernel::kWgmma, 64, 128, 128, 0, 0, 9, Schedule::kPingpong, true, 1, 1,
     1, 60, "128 channels a tile: x_q drawn half as often as by 64x64, for wide layers"},
    {"128x64x128 swap", GemmKernel::kWgmma, 128, 64, 128, 0, 0, 9, Schedule::kPingpong, true, 1, 1,
     1, 65, "one tile holds 128 tokens: the weights are read once, without a cluster"},
    {"16x128x256 swap stream-K", GemmKernel::kWgmma, 16, 128, 256, 0, 0, 6, Schedule::kStreamK,
     true, 1, 1, 1, 25, "few tiles and at most 16 tokens: none of the 32 wasted"},
    {"256x128x128 stream-K", GemmKernel::kWgmma, 256, 128, 128, 0, 0, 4, Schedule::kStreamK, false,
     1, 2, 1, 88, "256x128 where its last wave would be mostly empty: shared over k"},
    {"128x256x128 stream-K 1x1", GemmKernel::kWgmma, 128, 256, 128, 0, 0, 4, Schedule::kStreamK,
     false, 1, 1, 1, 85, "shares single tiles over k, not pairs: evener, and more from L2"},
    {"stream 8x16 8 warps", GemmKernel::kStream, 8, 16, 128, 1, 8, 0, Schedule::kNone, false, 1, 1,
     1, 50, "two blocks per SM: one reads on while the other adds up and stores"},
    {"stream 16x16 8 warps", GemmKernel::kStream, 16, 16, 128, 1, 8, 0, Schedule::kNone, false, 1,
     1, 1, 50, "the same with two groups of 8 tokens"},
};
static_assert(tiles_hold(kSm90Candidates, std::size(kSm90Candidates), 227 * 1024),
              "a candidate breaks a rule of tile.h");

}  // namespace sqk
