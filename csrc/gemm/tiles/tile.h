// The rows of the GEMM tables: the tiles, and the rules that choose among them. Kernel ring: no
// torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sqk/gemm.h"

// If 1, each table ends with its candidates, which only the tuner runs.
// SMOOTHQUANT_KERNELS_TUNING=1 sets it for a build (CONTRIBUTING.md).
#ifndef SQK_TUNING
#define SQK_TUNING 0
#endif

namespace sqk {

enum class GemmKernel : int32_t {
  kStream,  // few tokens: each warp has a ring for its weights; mma.sync (stream/kernel.cuh)
  kMma,     // cp.async, ldmatrix and mma.sync in several stages (mma/kernel.cuh)
  kWgmma,   // TMA and wgmma, warp-specialized, by CUTLASS (wgmma/kernel.cuh; Hopper)
};

// How a kWgmma kernel distributes its work.
enum class Schedule : int32_t {
  kNone,
  kPingpong,     // two warpgroups on two tiles: one multiplies while the other stores
  kCooperative,  // two warpgroups on one tile
  kStreamK,      // cooperative; blocks share the tiles of an incomplete last wave over k
};

// m counts tokens and n counts output channels, also if the instruction takes them the other way.
struct GemmTile {
  const char* name;
  GemmKernel kernel;
  int32_t m, n, k;
  int32_t warps_m, warps_n;  // kMma: of a block, along m and n; kStream: 1 and at most this many
  int32_t stages;            // tiles of x_q and w_q in shared memory at a time; kStream: 0
  Schedule schedule;         // kWgmma
  bool swap_ab;              // kWgmma: w_q on the instruction's 64-row side, tokens on the other
  int32_t cluster_m, cluster_n;  // blocks along m and n that share their loads
  int32_t most_splits;  // kMma, w4_only: blocks that may share a tile's k through the workspace
  bool gated;           // has a gated kernel besides; see serves_gated
  bool w4;              // has a kernel for weights of 4 bits
  bool w4_only;         // and no other one; the name starts with "w4"
  int32_t rate;         // percent of the tensor cores' peak in the main loop: an estimate
};

// Where int8 weights take the tile too, theirs are the most bytes. Weights of 4 bits come with a
// step and an offset.
constexpr int64_t stage_bytes(const GemmTile& tile) {
  const int64_t row = tile.w4_only ? (kW4Bytes + 2) * tile.k / kW4Group : tile.k;
  return tile.stages * (int64_t{tile.m} * tile.k + tile.n * row);
}

// An upper bound of a block's dynamic shared memory. CUTLASS keeps barriers and the scheduler's
// data next to the stages.
constexpr int64_t shared_bytes(const GemmTile& tile) {
  return stage_bytes(tile) + (tile.kernel == GemmKernel::kWgmma ? 1024 : 0);
}

// Whether a tile can compute gated GEMMs. Where channels are the rows of the instruction, the
// kernel does both; else the gated one is an instance of its own.
constexpr bool serves_gated(const GemmTile& tile) {
  return tile.kernel == GemmKernel::kStream || tile.swap_ab || tile.gated;
}

// The first rule with m <= most_m names the candidates. plan_gemm takes the one with the least
// expected time (cost.cpp), and the first one if several are nearly equal.
constexpr int kMostCandidates = 6;
struct GemmRule {
  int64_t most_m;
  int32_t candidates[kMostCandidates];  // rows of the tiles; -1: none
  const char* when;
  const char* why;
};

// What the cost model knows of a GPU, in clocks of the multiprocessors (SMs).
struct GemmMachine {
  int32_t macs;          // int8 multiply-adds of an SM per clock
  int32_t l2_bytes;      // per SM and clock if all SMs read from L2
  int32_t sm_bytes;      // per clock that one SM can receive
  int32_t memory_bytes;  // per clock from memory, for all SMs: nine tenths of the data sheet
  int32_t overhead;      // clocks for a tile's first loads and last stores
  int32_t launch;        // clocks for one more launch (clearing counters) in a graph
};

struct GemmTableView {
  const char* name;
  GemmMachine machine;
  const GemmTile* tiles;
  int32_t tile_count;
  int32_t shipped;  // the first ones; a tuning build's candidates follow
  const GemmRule* rules;
  int32_t rule_count;
};

const GemmTableView& gemm_table(GemmTable table);

constexpr int64_t kAnyM = int64_t{1} << 40;

constexpr bool same_text(const char* a, const char* b) {
  while (*a != '\0' && *a == *b) ++a, ++b;
  return *a == *b;
}

constexpr bool mma_holds(const GemmTile& tile) {
  const int rows = tile.m / tile.warps_m, columns = tile.n / tile.warps_n;
  return rows % 16 == 0 && columns % 16 == 0 && tile.k % 32 == 0 && tile.stages >= 2 &&
         rows * columns <= 64 * 64;  // 128 accumulators a thread
}

constexpr bool wgmma_holds(const GemmTile& tile) {
  const int groups = tile.schedule == Schedule::kPingpong ? 1 : 2;
  const int rows = tile.swap_ab ? tile.n : tile.m, columns = tile.swap_ab ? tile.m : tile.n;
  return tile.schedule != Schedule::kNone && rows % (64 * groups) == 0 && columns % 8 == 0 &&
         columns <= 256 && rows / groups * columns <= 64 * 256;  // 128 accumulators a thread
}

// Whether a tile is valid. Candidates must be valid too.
constexpr bool tile_holds(const GemmTile& tile, int64_t shared_limit) {
  const bool mma = tile.kernel == GemmKernel::kMma, wgmma = tile.kernel == GemmKernel::kWgmma;
  const bool for_wgmma =
      tile.schedule != Schedule::kNone || tile.swap_ab || tile.cluster_m * tile.cluster_n != 1;
  if ((tile.w4 && tile.k % kW4Group != 0) || (tile.w4_only && tile.gated)) return false;
  if (tile.m < 8 || tile.n < 16 || tile.rate < 1 || tile.rate > 100 || tile.most_splits < 1 ||
      shared_bytes(tile) > shared_limit || (for_wgmma && !wgmma) ||
      (tile.most_splits > 1 && !mma && !(wgmma && tile.w4_only))) {
    return false;
  }
  return mma ? mma_holds(tile) : wgmma ? wgmma_holds(tile) : true;
}

// Whether all tiles are valid and no two have the same name.
constexpr bool tiles_hold(const GemmTile* tiles, int64_t count, int64_t shared_limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (!tile_holds(tiles[i], shared_limit)) return false;
    for (int64_t j = 0; j < i; ++j) {
      if (same_text(tiles[j].name, tiles[i].name)) return false;
    }
  }
  return true;
}

// Whether a table is valid; every table is static_assert'ed with it.
constexpr bool table_holds(const GemmTableView& t, int64_t shared_limit) {
  if (t.tile_count > 64) return false;  // excluded.h has one bit per row
  if (t.shipped > t.tile_count || !tiles_hold(t.tiles, t.tile_count, shared_limit)) return false;
  for (int i = 0; i < t.rule_count; ++i) {
    if (i > 0 && t.rules[i].most_m <= t.rules[i - 1].most_m) return false;
    if (t.rules[i].candidates[0] < 0) return false;
    for (int candidate : t.rules[i].candidates) {
      if (candidate >= t.shipped) return false;
      if (candidate >= 0 && t.tiles[candidate].w4_only) return false;  // rules are for int8
      // A streaming kernel takes no more tokens than its tile has.
      if (candidate >= 0 && t.tiles[candidate].kernel == GemmKernel::kStream &&
          t.rules[i].most_m > t.tiles[candidate].m) {
        return false;
      }
    }
  }
  return t.rules[t.rule_count - 1].most_m == kAnyM;
}

}  // namespace sqk
