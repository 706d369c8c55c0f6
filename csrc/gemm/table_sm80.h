// A100 and everything that has no table of its own but as much shared memory. Kernel ring: no
// torch. The one place to change when a measurement says otherwise; nothing here was tuned on a
// GPU.
//
// 108 SMs, 2048 multiply-adds and some 32 bytes from L2 per SM and clock, 164 KiB of shared memory:
// two blocks of up to 80 KiB per SM hide each other's first loads and last stores.
#pragma once

#include <iterator>

#include "gemm/candidates_sm80.h"
#include "gemm/tile.h"

namespace sqk {

constexpr GemmTile kSm80Shipped[] = {
    {"stream 8x16", GemmKernel::kStream, 8, 16, 128, 1, 16, 0, Schedule::kNone, false, 1, 1, 1, 50,
     "16 warps share k; 96 KiB of weights in flight per SM, in rings that run on from tile to "
     "tile"},
    {"stream 16x16", GemmKernel::kStream, 16, 16, 128, 1, 16, 0, Schedule::kNone, false, 1, 1, 1,
     50, "the same with two groups of 8 tokens: the weights are still read once"},
    {"16x64x128", GemmKernel::kMma, 16, 64, 128, 1, 4, 6, Schedule::kNone, false, 1, 1, 8, 40,
     "60 KiB in flight per block, two blocks per SM: enough for the memory's latency"},
    {"32x64x128", GemmKernel::kMma, 32, 64, 128, 1, 4, 6, Schedule::kNone, false, 1, 1, 8, 55,
     "72 KiB, two blocks per SM; each weight meets 32 tokens"},
    {"64x64x128", GemmKernel::kMma, 64, 64, 128, 2, 2, 4, Schedule::kNone, false, 1, 1, 8, 65,
     "twice the blocks of 64x128: for narrow layers"},
    {"64x128x128", GemmKernel::kMma, 64, 128, 128, 2, 2, 3, Schedule::kNone, false, 1, 1, 8, 75,
     "72 KiB, two blocks per SM; warps of 32x64"},
    {"128x128x64", GemmKernel::kMma, 128, 128, 64, 2, 2, 5, Schedule::kNone, false, 1, 1, 4,
     95,  // 94 % of the data sheet was measured for a whole GEMM: 586 TOPS, TensorRT-LLM
     "80 KiB, two blocks per SM; warps of 64x64: 64 bytes from shared memory per 2 mma.sync"},
    {"128x256x64", GemmKernel::kMma, 128, 256, 64, 2, 4, 4, Schedule::kNone, false, 1, 1, 1,
     95,  // the same
     "a third less from L2 than 128x128; one block of 8 warps per SM"},
};

constexpr auto kSm80Tiles = with_candidates(kSm80Shipped, kSm80Candidates);

constexpr GemmRule kSm80Rules[] = {
    {8,
     {0, -1, -1, -1, -1, -1},
     "M <= 8",
     "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {1, 2, -1, -1, -1, -1},
     "M <= 16",
     "as above; shared memory where the tokens' re-reading costs more"},
    {32,
     {3, -1, -1, -1, -1, -1},
     "M <= 32",
     "one tile holds all tokens: the weights are read once"},
    {64, {5, 4, -1, -1, -1, -1}, "M <= 64", "one tile holds all tokens: the weights are read once"},
    {128, {5, 4, 6, -1, -1, -1}, "M <= 128", "two tiles of 64 or one of 128: what fills the SMs"},
    {512,
     {6, 5, 7, 4, -1, -1},
     "M <= 512",
     "waves decide: 64x128 for the tails, 128x128 and splits else"},
    {kAnyM, {6, 7, 5, 4, -1, -1}, "M > 512", "the largest tiles that their waves allow"},
};

constexpr GemmTableView kSm80Table = {
    "sm80",
    // L2: 30 bytes would cap 128x128 at 585 TOPS, and 586 were measured.
    {2048, 32, 64, 1300, 1500, 2000},
    kSm80Tiles.data(),
    static_cast<int32_t>(kSm80Tiles.size()),
    static_cast<int32_t>(std::size(kSm80Shipped)),
    kSm80Rules,
    static_cast<int32_t>(std::size(kSm80Rules))};
static_assert(table_holds(kSm80Table, 163 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
