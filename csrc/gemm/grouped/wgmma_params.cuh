// What the blocks of Hopper's GEMM by experts (grouped/wgmma.cuh) work on. Kernel ring: no torch.
#pragma once

#include "common/memory_order.cuh"
#include "common/tma.cuh"
#include "gemm/epilogue/params.cuh"
#include "gemm/grouped/kernels.h"
#include "sqk/grouped.h"

namespace sqk {

struct GroupedWgmmaParams {
  CUtensorMap x;           // boxes of the tokens of a tile x kK
  CUtensorMap w;           // boxes of the channels of a tile x kK, of one expert
  const int32_t* offsets;  // [experts + 1]
  int32_t experts;
  int32_t steps;  // along k
  int32_t n_tiles;
  int32_t raster;     // tiles along m that are computed before the next ones along n
  Epilogue epilogue;  // m, w_scale and bias are those of all experts
};

// One operand is the rows of the instruction: two warpgroups take 64 each. With kSwap these are
// channels, so that few tokens waste nothing.
template <int kTokensOfTile, int kChannelsOfTile, int kStagesOfRing, bool kSwapped>
struct GroupedWgmmaTile {
  static constexpr int kTokens = kTokensOfTile, kChannels = kChannelsOfTile;
  static constexpr int kStages = kStagesOfRing, kK = 128;
  static constexpr bool kSwap = kSwapped;
  static constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups;
  static constexpr int kColumns = kSwap ? kTokens : kChannels;
  static constexpr int kConsumers = 128 * kWarpgroups;
  // As in w4/wgmma_params.cuh: a warp loads, or a whole warpgroup that gives up its registers.
  static constexpr bool kGivesRegisters = kColumns > 128;
  static constexpr int kThreads = kConsumers + (kGivesRegisters ? 128 : 32);
  static constexpr int kRowBytes = kRows * kK, kColumnBytes = kColumns * kK;
  static constexpr int kStageBytes = kRowBytes + kColumnBytes;
  static constexpr int kColumnsAt = kStages * kRowBytes;
  static constexpr int kBarriersAt = kStages * kStageBytes;
  static constexpr int kExpertsAt = kBarriersAt + 16 * kStages;
  static_assert((kSwap ? kChannels : kTokens) == kRows && kColumns % 8 == 0 && kColumns <= 256);

  // Dynamic, per block.
  static constexpr int64_t shared_bytes(int64_t experts) {
    return kExpertsAt + expert_bytes(experts);
  }
};

// A tile of one expert.
struct GroupedUnit {
  int32_t expert;
  int32_t token0, last;  // its first token, and the end of the expert's
  int32_t channel0;
};

// Where each expert's tokens and tiles start, in shared memory. Offsets out of order or range are
// moved up or down to be in order, so that no tile leaves the arrays or counts twice.
template <class Tile>
class GroupedExperts {
 public:
  __device__ GroupedExperts(const GroupedWgmmaParams& p, uint8_t* shared)
      : p_(p),
        starts_(reinterpret_cast<int32_t*>(shared + Tile::kExpertsAt)),
        tiles_(starts_ + p.experts + 1) {}

  // By all threads of the block, after the wait for the kernel before. A barrier must follow.
  __device__ void find() {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x, each = p_.experts / 32 + 1;
    const int first = min(lane * each, p_.experts + 1), end = min(first + each, p_.experts + 1);
    for (int e = lane; e <= p_.experts; e += 32) {
      starts_[e] = min(max(load_fresh(p_.offsets + e), 0), p_.epilogue.m);
    }
    __syncwarp();
    int32_t most = 0;
    for (int e = first; e < end; ++e) most = max(most, starts_[e]);
    most = before(most, [](int32_t a, int32_t b) { return max(a, b); });
    for (int e = first; e < end; ++e) {
      most = max(most, starts_[e]);
      starts_[e] = most;
    }
    __syncwarp();
    int32_t tiles = 0;
    for (int e = first; e < end; ++e) tiles += tiles_of(e);
    tiles = before(tiles, [](int32_t a, int32_t b) { return a + b; });
    for (int e = first; e < end; ++e) {
      tiles_[e] = tiles;
      tiles += tiles_of(e);
    }
  }

  __device__ uint32_t units() const {
    return static_cast<uint32_t>(tiles_[p_.experts]) * p_.n_tiles;
  }
  __device__ int32_t first_token() const { return starts_[0]; }
  __device__ int32_t last_token() const { return starts_[p_.experts]; }

  // Of an expert, tiles go along m within a raster group, then along n, then to the next raster
  // group; so blocks that run at the same time need few distinct rows of both operands.
  __device__ GroupedUnit unit(uint32_t number) const {
    const auto tile = static_cast<int32_t>(number / p_.n_tiles);
    int low = 0, high = p_.experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (tiles_[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int32_t m_tiles = tiles_[high] - tiles_[low];
    const uint32_t mine = number - static_cast<uint32_t>(tiles_[low]) * p_.n_tiles;
    const uint32_t whole = static_cast<uint32_t>(p_.raster) * p_.n_tiles;
    const auto first = static_cast<int32_t>(mine / whole) * p_.raster;
    const uint32_t rest = mine % whole, rows = min(p_.raster, m_tiles - first);
    const int32_t m = first + static_cast<int32_t>(rest % rows);
    return {low, starts_[low] + m * Tile::kTokens, starts_[high],
            static_cast<int32_t>(rest / rows) * Tile::kChannels};
  }

 private:
  __device__ int32_t tiles_of(int e) const {
    return e < p_.experts ? (starts_[e + 1] - starts_[e] + Tile::kTokens - 1) / Tile::kTokens : 0;
  }

  // What the lanes before this one have together; 0 for the first one.
  template <typename Join>
  __device__ static int32_t before(int32_t mine, Join join) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, mine, distance);
      if (lane >= distance) mine = join(mine, other);
    }
    const int32_t others = __shfl_up_sync(0xffffffffu, mine, 1);
    return lane == 0 ? 0 : others;
  }

  const GroupedWgmmaParams& p_;
  int32_t* const starts_;  // [experts + 1]: tokens
  int32_t* const tiles_;   // [experts + 1]: along m
};

}  // namespace sqk
