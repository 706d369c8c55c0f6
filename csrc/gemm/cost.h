// What the choice of a tile expects of it: how long a problem takes, and which resource takes the
// longest. Kernel ring: no torch; this needs no CUDA compiler and no GPU.
//
// The only prediction of a GEMM's time in the project: benchmarks/prediction prints it.
#pragma once

#include <cstdint>

#include "gemm/tiles/tile.h"

namespace sqk {

// Tiles of the output. Clusters are launched whole, so both sides are rounded up to clusters.
int64_t tiles_of(const GemmTile& tile, const GemmParams& p);

struct GemmCost {
  double clocks;
  const char* bound_by;  // "tensor cores", "L2", "SM intake", "memory" or "latency"
};

GemmCost expected_cost(const GemmTile& tile, const GemmMachine& machine, const GemmParams& p,
                       const Device& device, int64_t splits);

// The number of splits with the fewest expected clocks, at most one for each tile of k.
int64_t best_splits(const GemmTile& tile, const GemmMachine& machine, const GemmParams& p,
                    const Device& device);

}  // namespace sqk
