// Launches the GEMMs by experts by plan. Kernel ring: no torch.
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/entry.h"
#include "common/launch.h"
#include "common/valid_grouped.h"
#include "gemm/find.h"
#include "gemm/grouped/kernels.h"

namespace sqk {
namespace {

const GemmTile& tile_of(const GroupedPlan& plan) { return GroupedTiles::kTiles[plan.tile]; }

Status check_addresses(const GroupedParams& params, const GroupedPlan& plan) {
  constexpr int64_t kAlignment = 16;
  if (!has_operands(params) ||
      (plan.workspace_bytes > 0 &&
       (params.workspace == nullptr || !is_aligned(params.workspace, kAlignment)))) {
    return Status::kInvalidArgument;
  }
  return params.workspace_bytes < plan.workspace_bytes ? Status::kWorkspaceTooSmall
                                                       : Status::kSuccess;
}

bool is_mma(const GroupedPlan& plan) { return GroupedMmaKind::has(tile_of(plan)); }

// nullptr if the build has no kernel of the row.
GroupedLaunch launch_of(const GroupedPlan& plan) {
  if (GroupedStreamKind::has(tile_of(plan))) {
    return find_entry<GroupedStreamKind, GroupedTiles>(plan.tile);
  }
#if SQK_WITH_SM90
  if (GroupedWgmmaKind::has(tile_of(plan))) {
    return find_entry<GroupedWgmmaKind, GroupedTiles>(plan.tile);
  }
#endif
  return find_entry<GroupedMmaKind, GroupedTiles>(plan.tile);
}

}  // namespace

Status plan(const GroupedParams& params, GroupedPlan* plan) {
  Device device;
  Status status = current_device(&device);
  if (status == Status::kSuccess) status = plan_grouped(params, device, plan);
  if (status == Status::kSuccess && plan->launches > 0) {
    // The mma.sync kernels do not wait for the kernel before them.
    plan->overlap = !is_mma(*plan) && may_overlap(device);
  }
  return status;
}

Status grouped_gemm_s8(const GroupedParams& params, const GroupedPlan& plan, cudaStream_t stream) {
  Device device;
  Status status = current_device(&device);
  if (status != Status::kSuccess || plan.launches == 0) return status;
  status = check_addresses(params, plan);
  if (status != Status::kSuccess) return status;
  const GroupedLaunch launch_tile = launch_of(plan);
  return launch_tile == nullptr ? Status::kUnsupportedArch
                                : launch_tile(params, device, plan, stream);
}

}  // namespace sqk

extern "C" int32_t sqk_grouped_gemm_s8(const sqk::GroupedParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::grouped_gemm_s8);
}

extern "C" int32_t sqk_grouped_plan(const sqk::GroupedParams* params, sqk::GroupedPlan* plan) {
  return static_cast<int32_t>(sqk::plan(*params, plan));
}
