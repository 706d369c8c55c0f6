// How blocks share a tile's k through the workspace: the sizes. Kernel ring: no torch.
//
// With splits > 1 the workspace has a ticket (4 bytes) for each tile, rounded up to 256 bytes, then
// splits x tiles slots of int32 partial sums. Plain C++: plans need no GPU. The tickets are used,
// and cleared before the launch, only where tickets.h has none for the stream.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "gemm/tiles/tile.h"

namespace sqk {

constexpr int64_t split_counter_bytes(int64_t tiles) {
  return round_up(4 * tiles, kBufferAlignment);
}

// 0 if each tile has one block.
constexpr int64_t split_workspace_bytes(const GemmTile& tile, int64_t tiles, int32_t splits) {
  if (splits <= 1) return 0;
  return split_counter_bytes(tiles) + 4 * tiles * splits * tile.m * tile.n;
}

// The tiles along k that a block takes.
struct SplitRange {
  int32_t first, count;
};

// Counts differ by at most one. None is 0 if there are at least as many tiles along k as splits.
constexpr SplitRange split_range(int32_t k_tiles, int32_t splits, int32_t split) {
  const int32_t each = k_tiles / splits, longer = k_tiles % splits;
  return {split * each + (split < longer ? split : longer), each + (split < longer ? 1 : 0)};
}

}  // namespace sqk
