// Launches GEMMs and linear layers by plan. Kernel ring: no torch.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/arithmetic.h"
#include "common/entry.h"
#include "common/launch.h"
#include "gemm/find.h"
#include "gemm/measured.h"
#include "sqk/linear.h"

namespace sqk {
namespace {

const GemmTile& tile_of(const GemmPlan& plan) { return gemm_table(plan.table).tiles[plan.tile]; }

// Whether the kernel is another one than that of a GEMM without activation.
bool has_gated_kernel(const GemmParams& params, const GemmPlan& plan) {
  return is_gated(params) && tile_of(plan).gated;
}

// Empty if the build has no 9.0a.
WgmmaEntry wgmma_of([[maybe_unused]] const GemmParams& params,
                    [[maybe_unused]] const GemmPlan& plan) {
#if SQK_WITH_SM90
  if (is_w4(params)) return find_entry<W4WgmmaKind>(plan.table, plan.tile);
  return has_gated_kernel(params, plan) ? find_entry<GatedWgmmaKind>(plan.table, plan.tile)
                                        : find_entry<WgmmaKind>(plan.table, plan.tile);
#else
  return {};
#endif
}

// nullptr if the build has only 9.0a.
GemmLaunch mma_of([[maybe_unused]] const GemmParams& params,
                  [[maybe_unused]] const GemmPlan& plan) {
#if SQK_WITH_SM80
  if (is_w4(params)) return find_entry<W4MmaKind>(plan.table, plan.tile);
  return has_gated_kernel(params, plan) ? find_entry<GatedMmaKind>(plan.table, plan.tile)
                                        : find_entry<MmaKind>(plan.table, plan.tile);
#else
  return nullptr;
#endif
}

// Adds the workspace of CUTLASS's scheduler, which plan_gemm does not know.
void add_workspace(const GemmParams& params, const Device& device, GemmPlan* plan) {
  if (plan->launches == 0 || tile_of(*plan).kernel != GemmKernel::kWgmma) return;
  const WgmmaEntry entry = wgmma_of(params, *plan);
  if (entry.workspace_bytes != nullptr) {
    plan->workspace_bytes = entry.workspace_bytes(params, device);
  }
}

// Every kernel for 9.0a waits for the one before it. A gated one follows a memset, and only kernels
// are sure to overlap with kernels.
void add_overlap(const GemmParams& params, const Device& device, GemmPlan* plan) {
  if (plan->launches == 0) return;
  plan->overlap = may_overlap(device) && !is_gated(params);
  plan->weights_first = plan->overlap && params.w_constant;
}

// If the rules choose the streaming tile, which fuses the quantizer, it is kept. A measured tile
// may beat it as a GEMM alone, but by less than the separate launch of a quantizer costs.
Status keep_fused(const QuantizeParams& quantizer, const GemmParams& gemm, GemmPlan* plan) {
  if (plan->launches == 0 || gemm.tile >= 0 || tile_of(*plan).kernel == GemmKernel::kStream ||
      !stream_quantizes(quantizer, gemm)) {
    return Status::kSuccess;
  }
  Device device;
  GemmPlan by_rules;
  Status status = current_device(&device);
  if (status == Status::kSuccess) status = plan_by_rules(gemm, device, &by_rules);
  if (status == Status::kSuccess && tile_of(by_rules).kernel == GemmKernel::kStream) {
    add_overlap(gemm, device, &by_rules);
    *plan = by_rules;
  }
  return status;
}

// An aligned address, as an allocator would return.
constexpr uintptr_t kAllocated = kBufferAlignment;

Status check_workspace(const void* workspace, int64_t bytes, int64_t wanted) {
  constexpr int64_t kAlignment = 16;
  if (wanted > 0 && (workspace == nullptr || !is_aligned(workspace, kAlignment))) {
    return Status::kInvalidArgument;
  }
  return bytes < wanted ? Status::kWorkspaceTooSmall : Status::kSuccess;
}

Status launch(const GemmParams& params, const GemmPlan& plan, const QuantizeParams* fused,
              cudaStream_t stream) {
  Device device;
  const Status status = current_device(&device);
  if (status != Status::kSuccess || plan.launches == 0) return status;
  const bool has_x = fused != nullptr || (params.x_q != nullptr && params.x_scale != nullptr);
  if (!has_x || params.w_q == nullptr || params.w_scale == nullptr || params.y == nullptr) {
    return Status::kInvalidArgument;
  }
  if (is_gated(params)) {
    // The blocks of a row of tiles run in any order, so none of them can write the first value.
    const Status cleared =
        status_from_call(cudaMemsetAsync(params.y_scale, 0, sizeof(float) * params.m, stream));
    if (cleared != Status::kSuccess) return cleared;
  }
  const GemmTile& tile = tile_of(plan);
  if (tile.kernel == GemmKernel::kStream) {
    const StreamKernels kernels = is_w4(params) ? find_entry<W4StreamKind>(plan.table, plan.tile)
                                                : find_entry<StreamKind>(plan.table, plan.tile);
    return launch_stream(params, fused, device, plan, kernels, stream);
  }
  const bool wgmma = tile.kernel == GemmKernel::kWgmma;
  const GemmLaunch launch_tile = wgmma ? wgmma_of(params, plan).launch : mma_of(params, plan);
  if (launch_tile == nullptr) return Status::kUnsupportedArch;
  return launch_tile(params, device, plan, stream);
}

}  // namespace

Status plan(const GemmParams& params, GemmPlan* plan) {
  Device device;
  Status status = current_device(&device);
  if (status == Status::kSuccess) status = plan_gemm(params, device, plan);
  if (status == Status::kSuccess) {
    add_workspace(params, device, plan);
    add_overlap(params, device, plan);
  }
  return status;
}

Status gemm_s8(const GemmParams& params, const GemmPlan& plan, cudaStream_t stream) {
  const Status status =
      check_workspace(params.workspace, params.workspace_bytes, plan.workspace_bytes);
  return status == Status::kSuccess ? launch(params, plan, nullptr, stream) : status;
}

Status plan(const LinearParams& params, LinearPlan* out) {
  *out = {};
  QuantizeParams quantizer = params.quantize;
  // Callers may plan before they allocate. Their buffers will be aligned, because allocators align
  // them.
  if (quantizer.x_q == nullptr) quantizer.x_q = reinterpret_cast<int8_t*>(kAllocated);
  if (quantizer.x_scale == nullptr) quantizer.x_scale = reinterpret_cast<float*>(kAllocated);
  if (quantizer.m != params.gemm.m || quantizer.k != params.gemm.k) return Status::kInvalidArgument;
  GemmParams gemm = params.gemm;
  gemm.x_q = quantizer.x_q;
  gemm.x_q_stride = quantizer.x_q_stride;
  Status status = plan(gemm, &out->gemm);
  if (status == Status::kSuccess) status = plan(quantizer, &out->quantize);
  if (status != Status::kSuccess) return status;
  if (has_measured()) status = keep_fused(quantizer, gemm, &out->gemm);
  if (status != Status::kSuccess) return status;
  out->fused = out->gemm.launches > 0 && tile_of(out->gemm).kernel == GemmKernel::kStream &&
               stream_quantizes(quantizer, gemm);
  if (out->fused) out->quantize = {};  // checked, but not launched
  // The GEMM waits for the quantizer before it writes, so they can share a workspace.
  out->workspace_bytes = std::max(out->gemm.workspace_bytes, out->quantize.workspace_bytes);
  // The quantizer lets the GEMM start only when its own wait is over, so all that came before the
  // quantizer, such as whatever wrote the weights, is complete.
  if (!out->fused) out->gemm.weights_first = out->gemm.overlap;
  return status;
}

Status linear_s8(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  Status status =
      check_workspace(params.gemm.workspace, params.gemm.workspace_bytes, plan.workspace_bytes);
  if (status != Status::kSuccess) return status;
  if (plan.fused) return launch(params.gemm, plan.gemm, &params.quantize, stream);
  QuantizeParams quantizer = params.quantize;
  if (quantizer.m > 0 && (quantizer.x_q == nullptr || quantizer.x_scale == nullptr)) {
    return Status::kInvalidArgument;
  }
  quantizer.workspace = params.gemm.workspace;
  quantizer.workspace_bytes = params.gemm.workspace_bytes;
  status = quantize(quantizer, plan.quantize, stream);
  if (status != Status::kSuccess) return status;
  GemmParams gemm = params.gemm;
  gemm.x_q = quantizer.x_q;
  gemm.x_q_stride = quantizer.x_q_stride;
  gemm.x_scale = quantizer.x_scale;
  gemm.x_per_token = quantizer.scheme != Scheme::kPerTensor;
  return launch(gemm, plan.gemm, nullptr, stream);
}

}  // namespace sqk

extern "C" int32_t sqk_gemm_s8(const sqk::GemmParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::gemm_s8);
}

extern "C" int32_t sqk_linear_s8(const sqk::LinearParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::linear_s8);
}

extern "C" int32_t sqk_linear_plan(const sqk::LinearParams* params, sqk::LinearPlan* plan) {
  return static_cast<int32_t>(sqk::plan(*params, plan));
}
