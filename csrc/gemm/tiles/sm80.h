// A100, and other GPUs with as much shared memory and no table of their own. Kernel ring: no torch.
// This is the one place to change when a measurement says otherwise. Nothing here was tuned on a
// GPU.
//
// An A100 has 108 SMs. Each has 164 KiB of shared memory and, per clock, 2048 multiply-adds and
// about 32 bytes from L2. Two blocks of up to 80 KiB per SM hide each other's first loads and last
// stores.
#pragma once

#include "gemm/tiles/builder.h"

namespace sqk {

constexpr TileBuilder kSm80Shipped[] = {
    // 96 KiB of weights in flight per SM, in rings that continue from tile to tile.
    stream(8, 16).warps(16).rate(50),
    // Two groups of 8 tokens: the weights are still read once.
    stream(16, 16).warps(16).rate(50),
    // 60 KiB in flight per block, two blocks per SM: enough for the memory's latency.
    mma(16, 64, 128).warps(1, 4).stages(6).splits(8).rate(40),
    // 72 KiB, two blocks per SM; each weight is used for 32 tokens.
    mma(32, 64, 128).warps(1, 4).stages(6).splits(8).rate(55),
    // Twice as many blocks as 64x128, for narrow layers.
    mma(64, 64, 128).warps(2, 2).stages(4).splits(8).rate(65),
    // 72 KiB, two blocks per SM; warps of 32x64.
    mma(64, 128, 128).warps(2, 2).stages(3).splits(8).rate(75),
    // 80 KiB, two blocks per SM; warps of 64x64: 64 bytes from shared memory per 2 mma.sync.
    // 94 % of the data sheet was measured for a whole GEMM: 586 TOPS, TensorRT-LLM.
    mma(128, 128, 64).warps(2, 2).stages(5).splits(4).rate(95).gated(),
    // Reads a quarter less from L2 than 128x128; one block of 8 warps per SM.
    mma(128, 256, 64).warps(2, 4).stages(4).rate(95),
    // Weights of 4 bits. 49 KiB: 28 KiB of weights in flight per block, as 56 KiB of int8.
    mma(16, 64, 128).warps(1, 4).stages(8).splits(8).rate(40).w4_only(),
    // 49 KiB, two blocks per SM or three.
    mma(32, 64, 128).warps(1, 4).stages(6).splits(8).rate(55).w4_only(),
    // 49 KiB; each warp has all tokens, so every weight is unpacked once.
    mma(64, 128, 128).warps(1, 4).stages(3).splits(8).rate(70).w4_only(),
    // 73 KiB, two blocks per SM; warps of 64x64, two of which unpack the same weights.
    mma(128, 128, 128).warps(2, 2).stages(3).splits(4).rate(90).w4_only(),
};

// Only a tuning build compiles these. No rule names one until a measurement on a GPU shows that it
// is worth it; the tuner then prints which row to move up.
constexpr TileBuilder kSm80Candidates[] = {
    // 72 KiB, two blocks per SM: half as many tiles as 16x64, so x_q is loaded half as often.
    mma(16, 128, 128).warps(1, 4).stages(4).splits(8).rate(45),
    // 80 KiB, two blocks per SM; its warps of 32x32 read x_q half as often as those of 32x64x128.
    mma(32, 128, 128).warps(1, 4).stages(4).splits(8).rate(60),
    // 80 KiB instead of 64: a quarter more in flight.
    mma(64, 64, 128).warps(2, 2).stages(5).splits(8).rate(65).stages_in_name(),
    // 80 KiB, two blocks per SM; warps of 64x64 although there are only 64 tokens.
    mma(64, 256, 64).warps(1, 4).stages(4).splits(4).rate(80),
    // 72 KiB, two blocks per SM: narrow layers and many tokens.
    mma(128, 64, 128).warps(2, 2).stages(3).splits(8).rate(75),
    // 128 KiB, one block of 8 warps: half as many barriers as with k = 64.
    mma(128, 128, 128).warps(2, 4).stages(4).splits(4).rate(85),
    // 128x256 with tokens and channels exchanged: fills the waves of other problems.
    mma(256, 128, 64).warps(4, 2).stages(4).rate(88),
    // Two blocks per SM: one keeps reading while the other reduces and stores.
    stream(8, 16).warps(8).rate(50).warps_in_name(),
};

constexpr RuleRow kSm80Rules[] = {
    {8, {"stream 8x16"}, "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {"stream 16x16", "16x64x128"},
     "as above; shared memory where the tokens' re-reading costs more"},
    {32, {"32x64x128"}, "one tile holds all tokens: the weights are read once"},
    {64, {"64x128x128", "64x64x128"}, "one tile holds all tokens: the weights are read once"},
    {128,
     {"64x128x128", "64x64x128", "128x128x64"},
     "two tiles of 64 or one of 128: what fills the SMs"},
    {512,
     {"128x128x64", "64x128x128", "128x256x64", "64x64x128"},
     "waves decide: 64x128 for the tails, 128x128 and splits else"},
    {kAnyM,
     {"128x128x64", "128x256x64", "64x128x128", "64x64x128"},
     "the largest tiles that their waves allow"},
};

using Sm80Tiles = TileTable<kSm80Shipped, kSm80Candidates, kSm80Rules>;
// L2: 30 bytes would limit 128x128 to 585 TOPS, but 586 were measured.
constexpr GemmTableView kSm80Table =
    Sm80Tiles::view(GemmTable::kSm80, {2048, 32, 64, 1300, 1500, 2000});
static_assert(table_holds(kSm80Table, 163 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
