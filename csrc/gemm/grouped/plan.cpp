// Chooses the tile of a GEMM by experts. Kernel ring: no torch; this file needs no CUDA compiler
// and no GPU.
#include <algorithm>

#include "common/arithmetic.h"
#include "common/valid.h"
#include "gemm/grouped/gather.h"
#include "gemm/grouped/kernels.h"

namespace sqk {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

int64_t shared_bytes_of(const GroupedParams& params, const GemmTile& tile) {
  const bool wgmma = tile.kernel == GemmKernel::kWgmma;
  return shared_bytes(tile) + (wgmma ? expert_bytes(params.experts) : 0);
}

bool serves(const GroupedParams& params, const GemmTile& tile, const Device& device) {
  if (tile.kernel == GemmKernel::kStream && !grouped_stream_serves(tile.m, params)) return false;
  if (tile.kernel == GemmKernel::kWgmma && !(device.wgmma && has_map(params))) return false;
  return shared_bytes_of(params, tile) <= device.shared_bytes;
}

// wgmma kernels are persistent, and their tensor maps need the rows next to each other.
void plan_wgmma(const GroupedParams& params, const Device& device, GroupedPlan* plan) {
  plan->blocks = std::min<int64_t>(plan->blocks, std::max(1, device.sms));
  if (params.rows == nullptr) return;
  plan->launches = 2;
  plan->workspace_bytes = gathered_bytes(params);
}

// -1: none.
int32_t choose(const GroupedParams& params, const Device& device) {
  const int64_t rows = divide_up(params.m, std::min(params.experts, params.m));
  for (size_t i = 0; i < std::size(kGroupedRules); ++i) {
    const int32_t tile = GroupedTiles::kOfRules[i];
    if (rows <= kGroupedRules[i].most_rows &&
        device.shared_bytes >= kGroupedRules[i].least_shared &&
        serves(params, GroupedTiles::kTiles[tile], device)) {
      return tile;
    }
  }
  return -1;
}

}  // namespace

Status plan_grouped(const GroupedParams& params, const Device& device, GroupedPlan* plan) {
  *plan = {};
  const Status status = check(params, kGemmAlignment);
  if (status != Status::kSuccess) return status;
  if (params.tile >= static_cast<int32_t>(GroupedTiles::kTiles.size())) {
    return Status::kInvalidArgument;
  }
  if (device.capability < 80) return Status::kUnsupportedArch;
  if (params.m == 0) return Status::kSuccess;
  plan->tile = params.tile >= 0 ? params.tile : choose(params, device);
  if (plan->tile < 0) return Status::kUnsupportedShape;
  const GemmTile& tile = GroupedTiles::kTiles[plan->tile];
  if (!serves(params, tile, device)) return Status::kUnsupportedShape;
  const int64_t n_tiles = divide_up(params.n, tile.n);
  plan->launches = 1;
  // Streaming blocks write the zeros of rows of no expert besides.
  const int64_t m_tiles = tile.kernel == GemmKernel::kStream ? std::min(params.experts, params.m)
                                                             : most_grouped_tiles(params, tile.m);
  plan->blocks = m_tiles * n_tiles;
  plan->shared_bytes = shared_bytes_of(params, tile);
  if (plan->blocks > kMaxBlocks) return Status::kUnsupportedShape;
  if (tile.kernel == GemmKernel::kWgmma) plan_wgmma(params, device, plan);
  return Status::kSuccess;
}

}  // namespace sqk
