// Ada (RTX 40, L40S), RTX 30, and newer GPUs with 100 KiB of shared memory (RTX 50). Kernel ring:
// no torch. This is the one place to change when a measurement says otherwise. Nothing here was
// tuned on a GPU.
//
// These GPUs have 76 to 142 SMs. Each has, per clock, 1024 multiply-adds and about 16 bytes from
// L2. That is half the tensor throughput of an A100's SM, so two blocks of 48 KiB per SM keep it
// busy.
#pragma once

#include "gemm/tiles/builder.h"

namespace sqk {

constexpr TileBuilder kSm89Shipped[] = {
    // 48 KiB of weights in flight per SM, in rings that continue from tile to tile.
    stream(8, 16).warps(8).rate(50),
    // Two groups of 8 tokens: the weights are still read once.
    stream(16, 16).warps(8).rate(50),
    // 48 KiB, two blocks per SM; each weight is used for 32 tokens.
    mma(32, 64, 128).warps(1, 4).stages(4).splits(8).rate(60),
    // 48 KiB, two blocks per SM: for narrow layers.
    mma(64, 64, 128).warps(2, 2).stages(3).splits(8).rate(70),
    // 48 KiB, two blocks per SM; warps of 32x64.
    mma(64, 128, 64).warps(2, 2).stages(4).splits(8).rate(80),
    // 48 KiB, two blocks per SM; warps of 64x64. 90 % of the boost clock's peak was measured for a
    // whole GEMM: 662 TOPS on an L40S.
    mma(128, 128, 64).warps(2, 2).stages(3).splits(4).rate(95).gated(),
    // 72 KiB, one block of 8 warps; reads a quarter less from L2 than 128x128.
    mma(256, 128, 64).warps(4, 2).stages(3).rate(95),
    // Weights of 4 bits. 49 KiB, two blocks per SM: 28 KiB of weights in flight per block.
    mma(16, 64, 128).warps(1, 4).stages(8).splits(8).rate(45).w4_only(),
    // 49 KiB, two blocks per SM; each weight is used for 32 tokens.
    mma(32, 64, 128).warps(1, 4).stages(6).splits(8).rate(60).w4_only(),
    // 49 KiB, two blocks per SM; each warp has all tokens, so every weight is unpacked once.
    mma(64, 128, 128).warps(1, 4).stages(3).splits(8).rate(75).w4_only(),
    // 48.5 KiB, two blocks per SM; warps of 64x64, two of which unpack the same weights.
    mma(128, 128, 128).warps(2, 2).stages(2).splits(4).rate(90).w4_only(),
};

// Only a tuning build compiles these. No rule names one until a measurement on a GPU shows that it
// is worth it; the tuner then prints which row to move up.
constexpr TileBuilder kSm89Candidates[] = {
    // 40 KiB, two blocks per SM; half as many tiles as 32x64, for wide layers.
    mma(32, 128, 64).warps(1, 4).stages(4).splits(8).rate(60),
    // 48 KiB, two blocks per SM: narrow layers and many tokens.
    mma(128, 64, 64).warps(2, 2).stages(4).splits(8).rate(80),
    // 96 KiB, one block of 8 warps: half as many barriers as with k = 64.
    mma(128, 128, 128).warps(2, 4).stages(3).splits(4).rate(90),
};

constexpr RuleRow kSm89Rules[] = {
    {8, {"stream 8x16"}, "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {"stream 16x16", "32x64x128"},
     "as above; shared memory where the tokens' re-reading costs more"},
    {32, {"32x64x128"}, "one tile holds all tokens: the weights are read once"},
    {64, {"64x128x64", "64x64x128"}, "one tile holds all tokens: the weights are read once"},
    {256, {"64x128x64", "64x64x128", "128x128x64"}, "waves decide"},
    {kAnyM,
     {"128x128x64", "256x128x64", "64x128x64", "64x64x128"},
     "the largest tiles that their waves allow"},
};

using Sm89Tiles = TileTable<kSm89Shipped, kSm89Candidates, kSm89Rules>;
// Memory: 308 is an L40S. With the 360 of an RTX 4090, the estimates for an L40S would exceed its
// data sheet.
constexpr GemmTableView kSm89Table =
    Sm89Tiles::view(GemmTable::kSm89, {1024, 16, 40, 308, 1500, 3000});
static_assert(table_holds(kSm89Table, 99 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
