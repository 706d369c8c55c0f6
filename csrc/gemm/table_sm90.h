// Hopper (H100, H200, GH200). Kernel ring: no torch. The one place to change when a measurement
// says otherwise; nothing here was tuned on a GPU.
//
// 132 SMs, 4096 multiply-adds per SM and clock, but only some 30 bytes from L2: a block of 128x128
// needs 64 bytes per 4096 multiply-adds and is starved unless a cluster shares its loads, 128x256
// in clusters of two needs 32. So large M wants the largest tiles and multicast, small M wants
// every byte of the weights read once with some 100 KiB in flight per SM.
#pragma once

#include <iterator>

#include "gemm/candidates_sm90.h"
#include "gemm/tile.h"

namespace sqk {

constexpr GemmTile kSm90Shipped[] = {
    {"stream 8x16", GemmKernel::kStream, 8, 16, 128, 1, 16, 0, Schedule::kNone, false, 1, 1, 1, 50,
     "16 warps share k; 96 KiB of weights in flight per SM, in rings that run on from tile to "
     "tile"},
    {"stream 16x16", GemmKernel::kStream, 16, 16, 128, 1, 16, 0, Schedule::kNone, false, 1, 1, 1,
     50, "the same with two groups of 8 tokens: the weights are still read once"},
    {"16x64x256 swap", GemmKernel::kWgmma, 16, 64, 256, 0, 0, 11, Schedule::kPingpong, true, 1, 1,
     1, 25, "wgmma's 64 rows take channels, so that 16 tokens waste nothing; 220 KiB in flight"},
    {"32x64x256 swap", GemmKernel::kWgmma, 32, 64, 256, 0, 0, 9, Schedule::kPingpong, true, 1, 1, 1,
     40, "the same for 32 tokens"},
    {"32x128x256 swap stream-K", GemmKernel::kWgmma, 32, 128, 256, 0, 0, 5, Schedule::kStreamK,
     true, 1, 1, 1, 40, "few tiles (narrow layers): all SMs share them over k"},
    {"64x64x256 swap", GemmKernel::kWgmma, 64, 64, 256, 0, 0, 7, Schedule::kPingpong, true, 1, 1, 1,
     60, "the same for 64 tokens"},
    {"64x128x128 swap stream-K", GemmKernel::kWgmma, 64, 128, 128, 0, 0, 9, Schedule::kStreamK,
     true, 1, 1, 1, 60, "few tiles (narrow layers): all SMs share them over k"},
    {"64x128x128", GemmKernel::kWgmma, 64, 128, 128, 0, 0, 9, Schedule::kPingpong, false, 2, 1, 1,
     70, "65 to 128 tokens: a cluster of two covers them and loads the weights once"},
    {"128x128x128", GemmKernel::kWgmma, 128, 128, 128, 0, 0, 7, Schedule::kPingpong, false, 2, 1, 1,
     80, "one warpgroup stores while the other multiplies; a cluster of two shares the weights"},
    {"128x128x128 stream-K", GemmKernel::kWgmma, 128, 128, 128, 0, 0, 7, Schedule::kStreamK, false,
     1, 1, 1, 75, "grids that do not fill the last wave: its tiles are shared over k"},
    {"128x256x128", GemmKernel::kWgmma, 128, 256, 128, 0, 0, 4, Schedule::kCooperative, false, 2, 1,
     1, 90, "a cluster of two loads half of 256 channels each: 32 bytes from L2 per 4096 MACs"},
    {"256x128x128", GemmKernel::kWgmma, 256, 128, 128, 0, 0, 4, Schedule::kCooperative, false, 1, 2,
     1, 90, "the same with tokens and channels exchanged: other waves"},
    {"128x256x128 stream-K", GemmKernel::kWgmma, 128, 256, 128, 0, 0, 4, Schedule::kStreamK, false,
     2, 1, 1, 88, "the same where its last wave would be mostly empty: shared over k"},
};

constexpr auto kSm90Tiles = with_candidates(kSm90Shipped, kSm90Candidates);

constexpr GemmRule kSm90Rules[] = {
    {8,
     {0, -1, -1, -1, -1, -1},
     "M <= 8",
     "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {2, 1, 4, -1, -1, -1},
     "M <= 16",
     "one tile holds all tokens; narrow layers are shared over k"},
    {32,
     {3, 4, -1, -1, -1, -1},
     "M <= 32",
     "one tile holds all tokens; narrow layers are shared over k"},
    {64,
     {5, 6, -1, -1, -1, -1},
     "M <= 64",
     "one tile holds all tokens; narrow layers are shared over k"},
    {128, {7, 6, 9, 12, -1, -1}, "M <= 128", "a cluster holds all tokens, or all SMs share over k"},
    {512, {8, 7, 10, 11, 12, 9}, "M <= 512", "waves decide"},
    {kAnyM, {10, 11, 8, 12, 7, 9}, "M > 512", "the largest tiles that their waves allow"},
};

constexpr GemmTableView kSm90Table = {
    "sm90",
    // L2: 26 bytes would cap every tile at 1608 TOPS; FP8 reached 1601 with its quantizer.
    {4096, 30, 64, 1650, 1500, 2500},
    kSm90Tiles.data(),
    static_cast<int32_t>(kSm90Tiles.size()),
    static_cast<int32_t>(std::size(kSm90Shipped)),
    kSm90Rules,
    static_cast<int32_t>(std::size(kSm90Rules))};
static_assert(table_holds(kSm90Table, 227 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
