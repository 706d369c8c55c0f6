// Launches the attention to an int8 cache by plan. Kernel ring: no torch.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/kernels.h"
#include "common/entry.h"
#include "common/launch.h"
#include "common/tickets.h"

namespace sqk {
namespace {

DecodeKernel find_kernel(const DecodeShape& shape) {
  switch (shape.dim) {
    case 64:
      return decode_kernel_for<64>(shape.columns);
    case 128:
      return decode_kernel_for<128>(shape.columns);
    default:
      return decode_kernel_for<256>(shape.columns);
  }
}

// A window beyond every position hides nothing.
int32_t window_of(const AttentionParams& p) {
  return static_cast<int32_t>(std::min(p.window, kMostPositions));
}

}  // namespace

Status plan(const AttentionParams& params, AttentionPlan* plan) {
  Device device;
  const Status status = current_device(&device);
  return status == Status::kSuccess ? plan_attention(params, device, plan) : status;
}

Status decode_attention_s8(const AttentionParams& params, const AttentionPlan& plan,
                           cudaStream_t stream) {
  if (plan.blocks == 0) return Status::kSuccess;
  Device device;
  Status status = current_device(&device);
  if (status != Status::kSuccess) return status;
  if (params.q == nullptr || params.y == nullptr ||
      (plan.workspace_bytes > 0 &&
       (params.workspace == nullptr || !is_aligned(params.workspace, 16)))) {
    return Status::kInvalidArgument;
  }
  if (params.workspace_bytes < plan.workspace_bytes) return Status::kWorkspaceTooSmall;

  const KvCache& cache = params.cache;
  const DecodeShape shape = decode_shape(cache.k.dim, decode_columns(params));
  const int64_t groups = decode_groups(params, shape);
  DecodeParams p = {};
  p.a = params;
  p.splits = plan.splits;
  p.group = static_cast<int32_t>(params.heads / cache.heads);
  p.columns = static_cast<int32_t>(decode_columns(params));
  p.column_groups = divide_up(p.columns, shape.columns);
  p.window = window_of(params);
  p.pitch = static_cast<int32_t>(padded_head(cache.k.dim));
  p.holding = cache.blocks > 0 ? capacity(cache) : 0;
  p.block_size = cutlass::FastDivmod(static_cast<int>(std::max<int64_t>(cache.block_size, 1)));
  if (plan.splits > 1) {
    auto* const workspace = static_cast<uint8_t*>(params.workspace);
    const int64_t tickets = decode_ticket_bytes(groups);
    p.stats = reinterpret_cast<float2*>(workspace + tickets);
    p.partials = reinterpret_cast<float*>(p.stats + groups * plan.splits * shape.columns);
    p.tickets = groups <= kTickets ? find_tickets(stream) : nullptr;
    if (p.tickets == nullptr) {
      p.tickets = reinterpret_cast<uint32_t*>(workspace);
      status = status_from_call(cudaMemsetAsync(p.tickets, 0, tickets, stream));
      if (status != Status::kSuccess) return status;
    }
  }

  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(find_kernel(shape));
  launch.grid = dim3(static_cast<unsigned>(plan.blocks));
  launch.block = dim3(static_cast<unsigned>(plan.threads));
  launch.shared_bytes = plan.shared_bytes;
  launch.stream = stream;
  launch.overlap = may_overlap(device);
  static DevicesSeen seen[3][2];
  const int of_dim = shape.dim == 64 ? 0 : shape.dim == 128 ? 1 : 2;
  status = allow_shared_memory(launch.function, plan.shared_bytes, shape.columns == 8 ? 4 : 2,
                               seen[of_dim][shape.columns == 8]);
  return status == Status::kSuccess ? launch_kernel(launch, &p) : status;
}

}  // namespace sqk

extern "C" int32_t sqk_decode_attention_s8(const sqk::AttentionParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::decode_attention_s8);
}

extern "C" int64_t sqk_attention_workspace_bytes(const sqk::AttentionParams* params) {
  sqk::AttentionPlan plan;
  return sqk::plan(*params, &plan) == sqk::Status::kSuccess ? plan.workspace_bytes : -1;
}
