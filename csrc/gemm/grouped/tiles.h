// The tiles of the GEMMs by experts, and the rules that choose among them. Kernel ring: no torch.
// This is the one place to change when a measurement says otherwise. Nothing here was tuned on a
// GPU.
#pragma once

#include "gemm/tiles/builder.h"

namespace sqk {

// Rows of a tile belong to one expert.
constexpr TileBuilder kGroupedShipped[] = {
    // All of y has at most 8 rows: one group of mma.sync's columns. A full ring for each warp.
    stream(8, 16).warps(16).rate(50),
    // The same with two groups.
    stream(16, 16).warps(16).rate(50),
    // 60 KiB of weights in flight per block, as the tile of the same size in sm80.h.
    mma(16, 64, 128).warps(1, 4).stages(6).rate(40),
    // 48 KiB, two blocks per SM on every GPU.
    mma(64, 128, 64).warps(2, 2).stages(4).rate(70),
    // The same for more rows.
    mma(128, 128, 64).warps(2, 2).stages(3).rate(90),
    // 80 KiB: two blocks per SM where it has 160 KiB.
    mma(128, 128, 64).warps(2, 2).stages(5).rate(95).stages_in_name(),
    // Hopper: channels are the instruction's 64 rows, so few tokens waste nothing; 192 KiB of
    // weights in flight.
    wgmma(16, 128, 128).swap_ab().cooperative().stages(12).rate(25),
    // The same for more tokens: one tile holds an expert's, so its weights are read once.
    wgmma(64, 128, 128).swap_ab().cooperative().stages(9).rate(60),
    // Tokens are the rows.
    wgmma(128, 128, 128).cooperative().stages(6).rate(75),
    // Reads 48 bytes a clock from L2 at the tensor cores' peak, not 64.
    wgmma(128, 256, 128).cooperative().stages(4).rate(85),
};

// The first rule that holds and whose tile serves is taken.
struct GroupedRule {
  int64_t most_rows;     // of an expert, if all have the same number
  int64_t least_shared;  // bytes that one block can be given
  const char* tile;
  const char* why;
};

constexpr GroupedRule kGroupedRules[] = {
    {8, 0, "stream 8x16", "few rows in all: weights are read once, in 16-byte loads"},
    {16, 0, "stream 16x16", "the same; serves only if all experts together have so few rows"},
    {16, 0, "16x128x128 swap", "few rows: the weights are read once, and nothing else matters"},
    {64, 0, "64x128x128 swap", "one tile holds an expert's rows: its weights are read once"},
    {128, 0, "128x128x128", "one tile holds an expert's rows, in twice as many tiles as 128x256"},
    {kAnyM, 0, "128x256x128", "reads the least from L2"},
    {16, 0, "16x64x128", "few rows: the weights are read once, and nothing else matters"},
    {64, 0, "64x128x64", "one tile holds an expert's rows: its weights are read once"},
    {kAnyM, 160 * 1024, "128x128x64 5 stages", "the largest tile, two blocks per SM"},
    {kAnyM, 0, "128x128x64", "the largest tile, two blocks per SM"},
};

template <size_t kCount>
constexpr auto addresses_of(const TileBuilder (&rows)[kCount]) {
  std::array<const TileBuilder*, kCount> addresses{};
  for (size_t i = 0; i < kCount; ++i) addresses[i] = &rows[i];
  return addresses;
}

template <size_t kCount>
constexpr auto tiles_of_rules(const GroupedRule (&rules)[kCount]) {
  std::array<int32_t, kCount> tiles{};
  constexpr auto kNames = names_of(addresses_of(kGroupedShipped));
  for (size_t i = 0; i < kCount; ++i) tiles[i] = row_of(rules[i].tile, kNames, kNames.size());
  return tiles;
}

// What find_entry searches (find.h). As in the other tables, the order of the rows has no meaning.
struct GroupedTiles {
  static constexpr auto kNames = names_of(addresses_of(kGroupedShipped));
  static constexpr auto kTiles = tiles_of(addresses_of(kGroupedShipped), kNames);
  static constexpr auto kOfRules = tiles_of_rules(kGroupedRules);

  static constexpr bool has(TileKey key) {
    for (const GemmTile& tile : kTiles) {
      if (key_of(tile) == key) return true;
    }
    return false;
  }
};
static_assert(tiles_hold(GroupedTiles::kTiles.data(), GroupedTiles::kTiles.size(), 227 * 1024),
              "a row of the table breaks a rule of tile.h");
static_assert(kGroupedRules[std::size(kGroupedRules) - 1].most_rows == kAnyM &&
                  kGroupedRules[std::size(kGroupedRules) - 1].least_shared == 0,
              "every GPU and every number of rows must have a rule");

}  // namespace sqk
