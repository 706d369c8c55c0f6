// What the blocks of Hopper's GEMM with weights of 4 bits (w4/wgmma.cuh) work on. Kernel ring: no
// torch.
#pragma once

#include "common/tma.cuh"
#include "gemm/epilogue/params.cuh"
#include "gemm/splits.h"

namespace sqk {

struct W4WgmmaParams {
  CUtensorMap x;      // boxes of the tokens of a tile x a group
  CUtensorMap w;      // boxes of the channels of a tile x a group
  CUtensorMap group;  // boxes of the channels of a tile
  int32_t groups;     // along k
  int32_t m_tiles, n_clusters;
  int32_t raster;     // tiles along m that are computed before the next ones along n
  int32_t splits;     // blocks per tile
  uint32_t* tickets;  // [tiles], 0 before the launch and after it; for splits > 1
  int4* partials;     // [splits, tiles, tokens * channels / 4]; for splits > 1
  bool weights_first;
  Epilogue epilogue;
};

template <int kTokensOfTile, int kStagesOfRing, int kBlocksOfCluster>
struct W4WgmmaTile {
  static constexpr int kTokens = kTokensOfTile, kStages = kStagesOfRing;
  static constexpr int kCluster = kBlocksOfCluster;  // along n: they share the tokens
  static constexpr int kWarpgroups = 2, kChannels = 64 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;
  // A warp loads. If the sums need more registers than three warps in a quarter of an SM can have,
  // it takes a whole warpgroup with it, which gives its registers to the others.
  static constexpr bool kGivesRegisters = kTokens > 128;
  static constexpr int kThreads = kConsumers + (kGivesRegisters ? 128 : 32);
  static constexpr int kXBytes = kTokens * kW4Group, kWBytes = kChannels * kW4Bytes;
  static constexpr int kGroupBytes = 2 * kChannels;
  static constexpr int kStageBytes = kXBytes + kWBytes + kGroupBytes;
  // x first: its swizzle counts from multiples of 1024 bytes.
  static constexpr int kWAt = kStages * kXBytes, kGroupAt = kWAt + kStages * kWBytes;
  static constexpr int kBarriersAt = kGroupAt + kStages * kGroupBytes;
  static constexpr int kShared = kBarriersAt + 16 * kStages;
  static_assert(kTokens % (8 * kCluster) == 0 && kTokens <= 256);
};

// What a block computes at a time: a tile, or the part of its k from group `first` on.
struct W4Unit {
  int32_t token0, channel0;
  uint32_t tile, split;
  SplitRange range;
};

// Tiles go along m within a raster group, then along n, then to the next raster group; so blocks
// that run at the same time need few distinct rows of both operands.
template <class Tile>
__device__ inline W4Unit w4_unit(const W4WgmmaParams& p, uint32_t unit) {
  const uint32_t block = blockIdx.x % Tile::kCluster;
  const uint32_t clusters = static_cast<uint32_t>(p.m_tiles) * p.n_clusters;
  const uint32_t split = p.splits > 1 ? unit / clusters : 0, cluster = unit - split * clusters;
  uint32_t m = 0, n = cluster;
  if (p.m_tiles > 1) {
    const uint32_t whole = static_cast<uint32_t>(p.raster) * p.n_clusters;
    const uint32_t first = cluster / whole * p.raster;
    const uint32_t rows = min(static_cast<uint32_t>(p.raster), p.m_tiles - first);
    const uint32_t rest = cluster % whole;
    m = first + rest % rows;
    n = rest / rows;
  }
  return {static_cast<int32_t>(m * Tile::kTokens),
          static_cast<int32_t>((n * Tile::kCluster + block) * Tile::kChannels),
          cluster * Tile::kCluster + block, split, split_range(p.groups, p.splits, split)};
}

}  // namespace sqk
