// How a block finds the rows it works on. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "common/reduce.cuh"

namespace sqk {

struct ExpertRows {
  const int32_t* offsets;  // [experts + 1]
  int32_t experts;
  int32_t m;
};

// The rows of an expert and the numbers of their tiles.
struct ExpertTiles {
  int32_t expert;        // -1: rows of no expert, to be written as zeros
  uint32_t first, last;  // the rows from first to last - 1
  uint32_t before;       // tiles of the rows before
  uint32_t tiles;        // 0: there is no such tile
};

// Where part i begins. Part 0 are the rows before the first expert, part 1 those of expert 0, and
// so on; the last one are the rows after the last expert. Offsets outside of [0, m] are clamped.
__device__ inline uint32_t begin_of_part(const ExpertRows& rows, uint32_t part) {
  if (part == 0) return 0;
  if (part > static_cast<uint32_t>(rows.experts) + 1) return rows.m;
  return min(max(rows.offsets[part - 1], 0), rows.m);
}

// The rows that tile number `tile` belongs to, when every part is cut into tiles of kM rows. All
// lanes of a warp must call it, with the same tile. An offset below an earlier one counts as that
// one, so the parts never overlap and have m rows together.
template <int kM>
__device__ inline ExpertTiles find_expert(const ExpertRows& rows, uint32_t tile) {
  // Each lane takes some adjacent parts.
  const uint32_t parts = rows.experts + 2, lane = threadIdx.x % 32;
  const uint32_t each = divide_up(parts, 32u);
  const uint32_t begin = min(lane * each, parts), end = min(begin + each, parts);

  uint32_t most = 0;  // the largest beginning up to this lane
  for (uint32_t part = begin; part < end; ++part) most = max(most, begin_of_part(rows, part));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, most, step);
    if (lane >= step) most = max(most, other);
  }
  const uint32_t earlier = __shfl_up_sync(kFullWarp, most, 1);
  const uint32_t first = max(lane > 0 ? earlier : 0, begin_of_part(rows, begin));

  uint32_t count = 0;  // of this lane's tiles
  for (uint32_t part = begin, from = first; part < end; ++part) {
    const uint32_t to = max(from, begin_of_part(rows, part + 1));
    count += divide_up(to - from, kM);
    from = to;
  }
  uint32_t upto = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, upto, step);
    if (lane >= step) upto += other;
  }

  ExpertTiles found = {};
  const bool is_here = tile < upto && tile >= upto - count;
  const uint32_t lanes = __ballot_sync(kFullWarp, is_here);
  if (lanes == 0) return found;
  if (is_here) {
    uint32_t part = begin;
    found.first = first;
    found.before = upto - count;
    while (true) {
      found.last = max(found.first, begin_of_part(rows, part + 1));
      found.tiles = divide_up(found.last - found.first, kM);
      if (tile - found.before < found.tiles) break;
      found.before += found.tiles;
      found.first = found.last;
      ++part;
    }
    found.expert = part > static_cast<uint32_t>(rows.experts) ? -1 : static_cast<int32_t>(part) - 1;
  }
  const int from = __ffs(lanes) - 1;
  found.expert = __shfl_sync(kFullWarp, found.expert, from);
  found.first = __shfl_sync(kFullWarp, found.first, from);
  found.last = __shfl_sync(kFullWarp, found.last, from);
  found.before = __shfl_sync(kFullWarp, found.before, from);
  found.tiles = __shfl_sync(kFullWarp, found.tiles, from);
  return found;
}

}  // namespace sqk
