// Ada (RTX 40, L40S), RTX 30, and newer GPUs with 100 KiB of shared memory (RTX 50). Kernel ring:
// no torch. The one place to change when a measurement says otherwise; nothing here was tuned on a
// GPU.
//
// 76 to 142 SMs, 1024 multiply-adds and some 16 bytes from L2 per SM and clock: half the tensor
// throughput of an A100 per SM, so 48 KiB a block, two blocks per SM, keep it fed.
#pragma once

#include <iterator>

#include "gemm/candidates_sm89.h"
#include "gemm/tile.h"

namespace sqk {

constexpr GemmTile kSm89Shipped[] = {
    {"stream 8x16", GemmKernel::kStream, 8, 16, 128, 1, 8, 0, Schedule::kNone, false, 1, 1, 1, 50,
     "8 warps share k; 48 KiB of weights in flight per SM, in rings that run on from tile to tile"},
    {"stream 16x16", GemmKernel::kStream, 16, 16, 128, 1, 8, 0, Schedule::kNone, false, 1, 1, 1, 50,
     "the same with two groups of 8 tokens: the weights are still read once"},
    {"32x64x128", GemmKernel::kMma, 32, 64, 128, 1, 4, 4, Schedule::kNone, false, 1, 1, 8, 60,
     "48 KiB, two blocks per SM; each weight meets 32 tokens"},
    {"64x64x128", GemmKernel::kMma, 64, 64, 128, 2, 2, 3, Schedule::kNone, false, 1, 1, 8, 70,
     "48 KiB, two blocks per SM: for narrow layers"},
    {"64x128x64", GemmKernel::kMma, 64, 128, 64, 2, 2, 4, Schedule::kNone, false, 1, 1, 8, 80,
     "48 KiB, two blocks per SM; warps of 32x64"},
    {"128x128x64", GemmKernel::kMma, 128, 128, 64, 2, 2, 3, Schedule::kNone, false, 1, 1, 4,
     95,  // 90 % of the boost clock's peak was measured for a whole GEMM: 662 TOPS on an L40S
     "48 KiB, two blocks per SM; warps of 64x64"},
    {"256x128x64", GemmKernel::kMma, 256, 128, 64, 4, 2, 3, Schedule::kNone, false, 1, 1, 1,
     95,  // the same
     "72 KiB, one block of 8 warps; a third less from L2 than 128x128"},
};

constexpr auto kSm89Tiles = with_candidates(kSm89Shipped, kSm89Candidates);

constexpr GemmRule kSm89Rules[] = {
    {8,
     {0, -1, -1, -1, -1, -1},
     "M <= 8",
     "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {1, 2, -1, -1, -1, -1},
     "M <= 16",
     "as above; shared memory where the tokens' re-reading costs more"},
    {32,
     {2, -1, -1, -1, -1, -1},
     "M <= 32",
     "one tile holds all tokens: the weights are read once"},
    {64, {4, 3, -1, -1, -1, -1}, "M <= 64", "one tile holds all tokens: the weights are read once"},
    {256, {4, 3, 5, -1, -1, -1}, "M <= 256", "waves decide"},
    {kAnyM, {5, 6, 4, 3, -1, -1}, "M > 256", "the largest tiles that their waves allow"},
};

constexpr GemmTableView kSm89Table = {
    "sm89",
    // Memory: an L40S; with the 360 of an RTX 4090, an L40S would be faster than its data sheet.
    {1024, 16, 40, 308, 1500, 3000},
    kSm89Tiles.data(),
    static_cast<int32_t>(kSm89Tiles.size()),
    static_cast<int32_t>(std::size(kSm89Shipped)),
    kSm89Rules,
    static_cast<int32_t>(std::size(kSm89Rules))};
static_assert(table_holds(kSm89Table, 99 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
