#include "gemm/cost.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "common/arithmetic.h"

namespace sqk {
namespace {

// Share of a tile's first loads and last stores that adds to the time although another tile
// multiplies meanwhile. An assumption.
constexpr double kShown = 0.2;

// Whether one tile loads or stores while another one multiplies on the same SM: two blocks of
// mma.sync (mma/kernel.cuh asks for two where 128 threads are enough, and the tables give such
// tiles at most half of the shared memory), or pingpong's two warpgroups.
bool hides_overhead(const GemmTile& tile) {
  if (tile.kernel == GemmKernel::kMma) return tile.warps_m * tile.warps_n <= 4;
  return tile.schedule == Schedule::kPingpong;
}

// Tiles that the busiest SM computes under CUTLASS's stream-K schedule: the last one or two waves
// are shared over k by as many blocks as get kLeastSteps tiles of k each. Full waves and a short k
// are not shared.
double stream_k_tiles(double tiles, double k_tiles, double sms) {
  constexpr double kLeastSteps = 8;
  const double full = std::floor(tiles / sms);
  if (full * sms == tiles || k_tiles <= kLeastSteps) return std::ceil(tiles / sms);
  const double whole = full > 1 ? full - 1 : 0, shared = tiles - whole * sms;
  return whole + shared / std::max(1.0, std::min(sms, shared * k_tiles / kLeastSteps));
}

// The bytes of a weight, with its share of the step and the offset.
double weight_bytes(const GemmParams& p) {
  return is_w4(p) ? static_cast<double>(kW4Bytes + 2) / kW4Group : 1.0;
}

// The main loop of one tile: as long as its scarcest resource takes. `weight`: the bytes of one.
GemmCost main_loop(const GemmTile& tile, const GemmMachine& machine, double k, double weight,
                   double busy_share) {
  // A cluster draws what it shares from L2 once; each of its SMs still takes in all of it.
  const double drawn = 1.0 * tile.m / tile.cluster_n + weight * tile.n / tile.cluster_m;
  const GemmCost resources[] = {
      {k * tile.m * tile.n / (machine.macs * tile.rate / 100.0), "tensor cores"},
      {k * drawn * busy_share / machine.l2_bytes, "L2"},
      {k * (tile.m + weight * tile.n) / machine.sm_bytes, "SM intake"},
  };
  return *std::max_element(
      std::begin(resources), std::end(resources),
      [](const GemmCost& a, const GemmCost& b) { return a.clocks < b.clocks; });
}

}  // namespace

int64_t tiles_of(const GemmTile& tile, const GemmParams& p) {
  return divide_up(p.m, tile.m * tile.cluster_m) * tile.cluster_m *
         divide_up(p.n, tile.n * tile.cluster_n) * tile.cluster_n;
}

// The busiest SM's main loops, what nothing hides of each tile's first loads and last stores, and
// the adding of partial sums. It is never less than memory takes to deliver everything once: tiles
// that can do no better are equal.
GemmCost expected_cost(const GemmTile& tile, const GemmMachine& machine, const GemmParams& p,
                       const Device& device, int64_t splits) {
  const auto tiles = static_cast<double>(tiles_of(tile, p));
  const auto k = static_cast<double>(divide_up(p.k, tile.k) * tile.k);
  const double sms = device.sms, area = 1.0 * tile.m * tile.n, each = static_cast<double>(splits);
  const bool stream_k = tile.schedule == Schedule::kStreamK;
  const double busy = stream_k ? sms : std::min(sms, tiles * each);
  const double weight = weight_bytes(p);
  GemmCost work = main_loop(tile, machine, k, weight, busy / sms);
  double rest = machine.overhead;
  if (tile.kernel == GemmKernel::kStream) {
    // The reads go on while the tile before is stored; the tokens stay in shared memory.
    work = {tiles / sms * k * weight * tile.n / machine.l2_bytes, "L2"};
  } else if (stream_k) {
    // Partial sums go through the workspace, whose counters are cleared first.
    work.clocks *= stream_k_tiles(tiles, k / tile.k, sms);
    rest += machine.overhead + machine.launch + 8.0 * area / machine.l2_bytes;
  } else {
    const double blocks = std::ceil(tiles * each / sms);
    work.clocks *= blocks / each;
    rest += (blocks - 1) * machine.overhead * (hides_overhead(tile) ? kShown : 1.0);
    if (splits > 1) rest += each * 4.0 * area / machine.l2_bytes + machine.launch;
  }
  const double bytes = weight * p.n * p.k + 1.0 * p.m * p.k + 2.0 * p.m * p.n;
  const double memory = bytes / machine.memory_bytes + machine.overhead;
  if (memory >= work.clocks + rest) return {memory, "memory"};
  return {work.clocks + rest, rest > work.clocks ? "latency" : work.bound_by};
}

int64_t best_splits(const GemmTile& tile, const GemmMachine& machine, const GemmParams& p,
                    const Device& device) {
  const auto clocks = [&](int64_t splits) {
    return expected_cost(tile, machine, p, device, splits).clocks;
  };
  const int64_t most = std::min<int64_t>(tile.most_splits, divide_up(p.k, tile.k));
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (tiles_of(tile, p) * splits > 4 * device.sms) break;
    if (clocks(splits) < clocks(best)) best = splits;
  }
  return best;
}

}  // namespace sqk
