// The producers of int8 activations. CPU ring: no torch, no CUDA.
#include "sqk/quantize.h"

#include <algorithm>
#include <cstring>

#include "common/entry.h"
#include "common/valid.h"
#include "cpu/layer.h"

namespace sqk {
namespace {

int64_t tasks_of(const QuantizeParams& p, int64_t threads) {
  return quantizer_tasks(p.m, p.m * p.k, threads);
}

int64_t scratch_bytes(const QuantizeParams& p) { return RowScratch::bytes(p.k, 1); }

}  // namespace

uint32_t largest_value(const RowQuantizer& quantizer, const QuantizeParams& params,
                       const Kernels& kernels, int8_t* memory, int64_t stride, uint32_t* maxima,
                       int64_t tasks, cudaStream_t stream) {
  parallel(stream, tasks, [&](int64_t task) {
    const RowScratch scratch(memory + task * stride, params.k);
    const Range rows = Range::of(params.m, 1, tasks, task);
    uint32_t most = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      most = std::max(most, quantizer.values(kernels, row, scratch.v));
    }
    maxima[task] = most;
  });
  return tasks == 0 ? 0 : *std::max_element(maxima, maxima + tasks);
}

Status plan(const QuantizeParams& params, QuantizePlan* plan) {
  *plan = {};
  const Status status = check(params);
  if (status != Status::kSuccess) return status;
  if (params.interleaved != 0) return Status::kUnsupportedShape;
  plan->path = QuantizePath::kAuto;
  plan->threads = static_cast<int32_t>(tasks_of(params, kMostThreads));
  plan->workspace_bytes =
      plan->threads * (scratch_bytes(params) + buffer_bytes(int64_t{sizeof(uint32_t)}));
  return Status::kSuccess;
}

Status quantize(const QuantizeParams& p, const QuantizePlan& plan, cudaStream_t stream) {
  if (p.workspace_bytes < plan.workspace_bytes) return Status::kWorkspaceTooSmall;
  if (plan.workspace_bytes > 0 && p.workspace == nullptr) return Status::kInvalidArgument;
  const Kernels& level = kernels();
  const int64_t tasks = tasks_of(p, std::min<int64_t>(plan.threads, thread_count(stream)));
  auto* const memory = static_cast<int8_t*>(p.workspace);
  const int64_t stride = scratch_bytes(p);
  RowQuantizer quantizer(p);
  if (p.scheme == Scheme::kPerTensor) {
    auto* maxima = reinterpret_cast<uint32_t*>(memory + tasks * stride);
    *p.x_scale = quantizer.set_absmax(
        largest_value(quantizer, p, level, memory, stride, maxima, tasks, stream));
  }
  parallel(stream, tasks, [&](int64_t task) {
    const RowScratch scratch(memory + task * stride, p.k);
    const Range rows = Range::of(p.m, 1, tasks, task);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float scale = quantizer.quantize(level, row, scratch.v, scratch.x_q);
      if (p.scheme != Scheme::kPerTensor) p.x_scale[row] = scale;
      int8_t* to = p.x_q + row * p.x_q_stride;
      std::memcpy(to, scratch.x_q, static_cast<size_t>(p.k));
      std::memset(to + p.k, 0, static_cast<size_t>(p.k_padded - p.k));
    }
  });
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_quantize(const sqk::QuantizeParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::quantize);
}

extern "C" int64_t sqk_quantize_workspace_bytes(const sqk::QuantizeParams* params) {
  sqk::QuantizePlan plan;
  return sqk::plan(*params, &plan) == sqk::Status::kSuccess ? plan.workspace_bytes : -1;
}
