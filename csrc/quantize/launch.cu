// Launches the row kernels by plan. Kernel ring: no torch.
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "common/entry.h"
#include "common/launch.h"
#include "quantize/kernels.h"

namespace sqk {
namespace {

// A block may have 48 KiB without a request; the kernels' own buffers need some of it.
constexpr int64_t kDefaultShared = 47 * 1024;

// A producer without a file in instances/ does not link.
template <int... kProducer>
RowKernel find_kernel(Producer producer, DType dtype, QuantizePath path, Launches launches,
                      bool rotates, std::integer_sequence<int, kProducer...>) {
  using Find = RowKernel (*)(DType, QuantizePath, Launches, bool);
  static constexpr Find kFind[] = {&row_kernel_for<static_cast<Producer>(kProducer)>...};
  return kFind[static_cast<int>(producer)](dtype, path, launches, rotates);
}

RowKernel find_kernel(Producer producer, DType dtype, QuantizePath path, Launches launches,
                      bool rotates) {
  if (path == QuantizePath::kCluster) {
#if SQK_WITH_SM90
    return cluster_kernel_for(producer, dtype);
#else
    return nullptr;
#endif
  }
  return find_kernel(producer, dtype, path, launches, rotates,
                     std::make_integer_sequence<int, kProducers>());
}

Status launch(RowKernel kernel, RowParams& params, const QuantizePlan& plan, int64_t blocks,
              bool overlap, cudaStream_t stream) {
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(kernel);
  launch.grid = dim3(static_cast<unsigned>(blocks));
  launch.block = dim3(static_cast<unsigned>(plan.threads));
  launch.shared_bytes = plan.shared_bytes;
  launch.stream = stream;
  launch.cluster = dim3(static_cast<unsigned>(plan.cluster));
  launch.overlap = overlap;
  return launch_kernel(launch, &params);
}

}  // namespace

Status plan(const QuantizeParams& params, QuantizePlan* plan) {
  Device device;
  const Status status = current_device(&device);
  return status == Status::kSuccess ? plan_quantize(params, device, plan) : status;
}

Status quantize(const QuantizeParams& params, const QuantizePlan& plan, cudaStream_t stream) {
  Device device;
  Status status = current_device(&device);
  if (status != Status::kSuccess || plan.launches == 0) return status;
  if (plan.workspace_bytes > 0 && params.workspace == nullptr) return Status::kInvalidArgument;
  if (params.workspace_bytes < plan.workspace_bytes) return Status::kWorkspaceTooSmall;
  const bool per_tensor = params.scheme == Scheme::kPerTensor;
  const bool two = per_tensor || plan.splits > 1;
  const bool rotates = params.rotation != 0;
  const bool overlap = may_overlap(device);
  RowKernel kernel = find_kernel(params.producer, params.dtype, plan.path,
                                 two ? Launches::kTwo : Launches::kOne, rotates);
  if (kernel == nullptr) return Status::kUnsupportedArch;
  if (plan.shared_bytes > kDefaultShared) {
    // Only kLong and kElement get here. Asks for the maximum that any row needs, because another
    // thread may be between this request and its launch. L1 does not help rows this long, so all of
    // the memory may be shared memory.
    static DevicesSeen seen[kProducers][kDTypes][2][2][2];
    DevicesSeen& of_kernel = seen[static_cast<int>(params.producer)][static_cast<int>(params.dtype)]
                                 [plan.path == QuantizePath::kLong][two][rotates];
    status = allow_shared_memory(reinterpret_cast<const void*>(kernel),
                                 device.shared_bytes - kReservedShared, 1, of_kernel);
    if (status != Status::kSuccess) return status;
  }

  RowParams row = {};
  row.q = params;
  row.splits = plan.splits;
  row.slice = plan.slice;
  row.slots = plan.slots;
  row.maxima = static_cast<uint32_t*>(params.workspace);
  if (plan.launches == 2) {
    row.pass = Pass::kMeasure;
    status = launch(kernel, row, plan, plan.blocks, overlap, stream);
    if (status != Status::kSuccess) return status;
    if (params.residual != nullptr) {  // the first pass wrote x + residual
      row.q.x = params.sum;
      row.q.x_stride = params.sum_stride;
      row.q.residual = nullptr;
    }
  }
  row.pass = two ? Pass::kApply : Pass::kWhole;
  row.maxima_count = per_tensor ? plan.workspace_bytes / 4 : plan.splits;
  return launch(kernel, row, plan, std::max<int64_t>(1, plan.blocks), overlap, stream);
}

}  // namespace sqk

extern "C" int32_t sqk_quantize(const sqk::QuantizeParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::quantize);
}

extern "C" int64_t sqk_quantize_workspace_bytes(const sqk::QuantizeParams* params) {
  sqk::QuantizePlan plan;
  return sqk::plan(*params, &plan) == sqk::Status::kSuccess ? plan.workspace_bytes : -1;
}
