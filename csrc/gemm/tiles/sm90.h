// Hopper (H100, H200, GH200). Kernel ring: no torch. This is the one place to change when a
// measurement says otherwise. Nothing here was tuned on a GPU.
//
// An H100 has 132 SMs. Each has, per clock, 4096 multiply-adds but only about 30 bytes from L2. A
// block of 128x128 needs 64 bytes per 4096 multiply-adds, so it starves unless a cluster shares its
// loads; 128x256 in clusters of two needs 32. So large M needs the largest tiles and multicast.
// Small M needs every byte of the weights read once, with about 100 KiB in flight per SM.
#pragma once

#include "gemm/tiles/builder.h"

namespace sqk {

constexpr TileBuilder kSm90Shipped[] = {
    // 96 KiB of weights in flight per SM, in rings that continue from tile to tile.
    stream(8, 16).warps(16).rate(50).w4(),
    // Two groups of 8 tokens: the weights are still read once.
    stream(16, 16).warps(16).rate(50).w4(),
    // wgmma's 64 rows take channels, so 16 tokens waste nothing; 220 KiB in flight.
    wgmma(16, 64, 256).swap_ab().pingpong().stages(11).rate(25),
    // The same for 32 tokens.
    wgmma(32, 64, 256).swap_ab().pingpong().stages(9).rate(40),
    // Few tiles (narrow layers): all SMs share them over k.
    wgmma(32, 128, 256).swap_ab().stream_k().stages(5).rate(40),
    // 64 tokens on the column side.
    wgmma(64, 64, 256).swap_ab().pingpong().stages(7).rate(60),
    // Few tiles (narrow layers): all SMs share them over k.
    wgmma(64, 128, 128).swap_ab().stream_k().stages(9).rate(60),
    // 65 to 128 tokens: a cluster of two covers them and loads the weights once.
    wgmma(64, 128, 128).pingpong().cluster(2, 1).stages(9).rate(70),
    // One warpgroup stores while the other multiplies; a cluster of two shares the weights.
    wgmma(128, 128, 128).pingpong().cluster(2, 1).stages(7).rate(80),
    // Grids that do not fill the last wave: its tiles are shared over k.
    wgmma(128, 128, 128).stream_k().stages(7).rate(75),
    // A cluster of two loads half of 256 channels each: 32 bytes from L2 per 4096 MACs.
    wgmma(128, 256, 128).cooperative().cluster(2, 1).stages(4).rate(90).gated(),
    // 128x256 with tokens and channels exchanged: fills the waves of other problems.
    wgmma(256, 128, 128).cooperative().cluster(1, 2).stages(4).rate(90),
    // 128x256 where its last wave would be mostly empty: shared over k.
    wgmma(128, 256, 128).stream_k().cluster(2, 1).stages(4).rate(88),
    // Weights of 4 bits: channels are the rows, and 176 KiB of weights are in flight; blocks share
    // the k of narrow layers.
    wgmma(16, 128, 128).swap_ab().cooperative().stages(22).splits(8).rate(25).w4_only(),
    // The same for 32 tokens.
    wgmma(32, 128, 128).swap_ab().cooperative().stages(18).splits(8).rate(40).w4_only(),
    // The same for 64 tokens: from here on the tensor cores take longer than the unpacking.
    wgmma(64, 128, 128).swap_ab().cooperative().stages(13).splits(8).rate(60).w4_only(),
    // Reads 24 bytes a clock from L2 at the tensor cores' peak.
    wgmma(128, 128, 128).swap_ab().cooperative().stages(9).splits(4).rate(75).w4_only(),
    // Fewer bytes of weights for each token; a cluster of two shares the tokens.
    wgmma(256, 128, 128).swap_ab().cooperative().cluster(1, 2).stages(5).rate(80).w4_only(),
};

// Only a tuning build compiles these. No rule names one until a measurement on a GPU shows that it
// is worth it; the tuner then prints which row to move up.
constexpr TileBuilder kSm90Candidates[] = {
    // 65 to 128 tokens of wide layers: half as many tiles as 64x128, so x_q is loaded half as
    // often.
    wgmma(64, 256, 128).pingpong().cluster(2, 1).stages(5).rate(75),
    // No cluster: any SM takes any tile, and their number may be odd; reads more from L2.
    wgmma(128, 128, 128).pingpong().cluster(1, 1).stages(7).rate(80).cluster_in_name(),
    // The pair shares the tokens, so a single row of tiles (65 to 128 tokens) wastes nothing.
    wgmma(128, 128, 128).pingpong().cluster(1, 2).stages(7).rate(80).cluster_in_name(),
    // Between 128x128 and 128x256: fills other waves and has one more stage in flight than 128x256.
    wgmma(128, 192, 128).cooperative().cluster(2, 1).stages(5).rate(85),
    // Four blocks share both operands: 24 bytes from L2 per 4096 MACs. A GPC may not hold a
    // multiple of four.
    wgmma(128, 256, 128).cooperative().cluster(2, 2).stages(4).rate(90).cluster_in_name(),
    // No cluster: no block waits for a partner; 48 bytes from L2 per 4096 MACs.
    wgmma(128, 256, 128).cooperative().cluster(1, 1).stages(4).rate(85).cluster_in_name(),
    // The pair shares the tokens, which are half of what a tile loads.
    wgmma(64, 64, 256).swap_ab().pingpong().cluster(1, 2).stages(7).rate(60).cluster_in_name(),
    // 128 channels per tile: x_q is loaded half as often as with 64x64, for wide layers.
    wgmma(64, 128, 128).swap_ab().pingpong().stages(9).rate(60),
    // One tile holds 128 tokens: the weights are read once, without a cluster.
    wgmma(128, 64, 128).swap_ab().pingpong().stages(9).rate(65),
    // Few tiles and at most 16 tokens, of which a tile of 32 would waste half.
    wgmma(16, 128, 256).swap_ab().stream_k().stages(6).rate(25),
    // 256x128 where its last wave would be mostly empty: shared over k.
    wgmma(256, 128, 128).stream_k().cluster(1, 2).stages(4).rate(88),
    // Splits single tiles over k instead of pairs: a more even split, but it reads more from L2.
    wgmma(128, 256, 128).stream_k().cluster(1, 1).stages(4).rate(85).cluster_in_name(),
    // Two blocks per SM: one keeps reading while the other reduces and stores.
    stream(8, 16).warps(8).rate(50).warps_in_name(),
    // The same with two groups of 8 tokens.
    stream(16, 16).warps(8).rate(50).warps_in_name(),
};

constexpr RuleRow kSm90Rules[] = {
    {8, {"stream 8x16"}, "weights are read once, in 16-byte loads; nothing else matters"},
    {16,
     {"16x64x256 swap", "stream 16x16", "32x128x256 swap stream-K"},
     "one tile holds all tokens; narrow layers are shared over k"},
    {32,
     {"32x64x256 swap", "32x128x256 swap stream-K"},
     "one tile holds all tokens; narrow layers are shared over k"},
    {64,
     {"64x64x256 swap", "64x128x128 swap stream-K"},
     "one tile holds all tokens; narrow layers are shared over k"},
    {128,
     {"64x128x128", "64x128x128 swap stream-K", "128x128x128 stream-K", "128x256x128 stream-K"},
     "a cluster holds all tokens, or all SMs share over k"},
    {512,
     {"128x128x128", "64x128x128", "128x256x128", "256x128x128", "128x256x128 stream-K",
      "128x128x128 stream-K"},
     "waves decide"},
    {kAnyM,
     {"128x256x128", "256x128x128", "128x128x128", "128x256x128 stream-K", "64x128x128",
      "128x128x128 stream-K"},
     "the largest tiles that their waves allow"},
};

using Sm90Tiles = TileTable<kSm90Shipped, kSm90Candidates, kSm90Rules>;
// L2: 26 bytes would limit every tile to 1608 TOPS; an FP8 GEMM reached 1601 with its quantizer.
constexpr GemmTableView kSm90Table =
    Sm90Tiles::view(GemmTable::kSm90, {4096, 30, 64, 1650, 1500, 2500});
static_assert(table_holds(kSm90Table, 227 * 1024), "a row of the table breaks a rule of tile.h");

}  // namespace sqk
