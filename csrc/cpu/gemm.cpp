// The int8 GEMM and the whole linear layer: both pack blocks of rows and multiply them by the
// weight. CPU ring: no torch, no CUDA.
#include "sqk/gemm.h"

#include <algorithm>
#include <numeric>

#include "common/entry.h"
#include "common/valid.h"
#include "cpu/blocks.h"

namespace sqk {
namespace {

// The sizes and buffers of a call. All are functions of the problem, not of the threads.
struct Division {
  Form form;
  int64_t group_bytes;  // of kGroup packed rows
  int64_t block_rows;   // a multiple of kGroup
  int64_t batch_rows;   // rows that are packed before they are multiplied; a multiple of the above
  int64_t tasks;        // at most, that pack
  int64_t scratch_bytes;

  Division(const Kernels& kernels, int64_t m, int64_t k, bool w4) {
    form = kernels.form(std::min(m, kMostRows), k, w4);
    group_bytes = kernels.packed_bytes(k, form);
    block_rows = rows_of_blocks(form, group_bytes, m);
    const int64_t waiting = kWaitingBytes / (block_rows / kGroup * group_bytes);
    batch_rows = block_rows * std::clamp(waiting, int64_t{1}, divide_up(m, block_rows));
    tasks = quantizer_tasks(divide_up(batch_rows, kGroup), batch_rows * k, kMostThreads);
    scratch_bytes = RowScratch::bytes(k, kGroup);
  }

  int64_t packed_bytes() const { return buffer_bytes(batch_rows / kGroup * group_bytes); }
  int64_t scale_bytes() const { return buffer_bytes(batch_rows * int64_t{sizeof(float)}); }
  int64_t maxima_bytes() const { return buffer_bytes(tasks * int64_t{sizeof(uint32_t)}); }
  int64_t workspace_bytes() const {
    return packed_bytes() + scale_bytes() + maxima_bytes() + tasks * scratch_bytes;
  }
};

// The rows to multiply: given, or quantized first.
struct Source {
  const GemmParams* given;        // x_q and x_scale, or null
  const RowQuantizer* quantizer;  // or null

  // Packs up to kGroup rows, and writes the scale of each if they are quantized.
  void pack(const Kernels& kernels, const Division& division, int64_t first, int64_t rows,
            int64_t k, const RowScratch& scratch, float* scales, uint8_t* packed) const {
    if (quantizer == nullptr) {
      const int64_t stride = given->x_q_stride;
      const auto row_at = [&](int64_t i) { return given->x_q + (first + i) * stride; };
      pack_group(kernels, division.form, k, rows, true, stride, row_at, scratch, packed);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      scales[i] =
          quantizer->quantize(kernels, first + i, scratch.v, scratch.x_q + i * scratch.stride);
    }
    kernels.pack(scratch.x_q, scratch.stride, rows, k, division.form, packed);
  }
};

float inverse_of_output(const GemmParams& p) {
  return p.out_scale != nullptr ? inverse_of(*p.out_scale) : 0.0f;
}

// Multiplies the packed rows [first, first + rows). Tasks are blocks of rows times ranges of
// columns, as many of them as divide evenly among the threads.
void multiply_batch(const GemmParams& p, const Kernels& kernels, const Division& division,
                    const uint8_t* packed, const float* scales, int64_t first, int64_t rows,
                    cudaStream_t stream) {
  const int64_t blocks = divide_up(rows, division.block_rows);
  const int64_t threads = thread_count(stream);
  // A channel's gate and up belong to one task.
  const int64_t unit = std::lcm(kernels.columns(division.form), is_gated(p) ? 2 * kGateBlock : 1);
  const int64_t most = divide_up(p.n, unit);
  const int64_t ranges = std::min(threads / std::gcd(blocks, threads), most);
  const float inverse = inverse_of_output(p);
  parallel(stream, blocks * ranges, [&](int64_t task) {
    const int64_t start = task / ranges * division.block_rows;
    const Range columns = Range::of(p.n, unit, ranges, task % ranges);
    Block block = {};
    block.gemm = &p;
    block.x = packed + start / kGroup * division.group_bytes;
    block.first_row = first + start;
    block.rows = std::min(division.block_rows, rows - start);
    block.x_scale = p.x_per_token ? scales + start : scales;
    block.out_inverse = inverse;
    block.first_column = columns.begin;
    block.last_column = columns.end;
    kernels.multiply(block, division.form);
  });
}

// p.x_scale is read if the rows are given. `quantize` is null for them.
Status run(const GemmParams& p, const GemmPlan& plan, const QuantizeParams* quantize,
           cudaStream_t stream) {
  if (plan.launches == 0) return Status::kSuccess;
  const Kernels* const planned = kernels_of(plan.tile);
  if (planned == nullptr) return Status::kInvalidArgument;
  const Kernels& level = *planned;
  const Division division(level, p.m, p.k, is_w4(p));
  if (p.workspace_bytes < division.workspace_bytes()) return Status::kWorkspaceTooSmall;
  const bool has_x = quantize != nullptr || (p.x_q != nullptr && p.x_scale != nullptr);
  if (!has_x || p.w_q == nullptr || p.w_scale == nullptr || p.y == nullptr ||
      p.workspace == nullptr) {
    return Status::kInvalidArgument;
  }
  if (is_gated(p)) std::fill_n(p.y_scale, p.m, *p.out_scale);  // rows with a NaN are marked later
  auto* const packed = static_cast<uint8_t*>(p.workspace);
  auto* const scales = reinterpret_cast<float*>(packed + division.packed_bytes());
  auto* const maxima =
      reinterpret_cast<uint32_t*>(packed + division.packed_bytes() + division.scale_bytes());
  auto* const scratch = reinterpret_cast<int8_t*>(maxima) + division.maxima_bytes();
  const int64_t threads = std::min(thread_count(stream), kMostThreads);

  GemmParams gemm = p;
  Source source = {&gemm, nullptr};
  RowQuantizer quantizer(quantize != nullptr ? *quantize : QuantizeParams{});
  if (quantize != nullptr) {
    source = {nullptr, &quantizer};
    gemm.x_per_token = 1;
    if (quantize->scheme == Scheme::kPerTensor) {
      const int64_t tasks = std::min(division.tasks, quantizer_tasks(p.m, p.m * p.k, threads));
      quantizer.set_absmax(largest_value(quantizer, *quantize, level, scratch,
                                         division.scratch_bytes, maxima, tasks, stream));
    }
  }
  for (int64_t first = 0; first < p.m; first += division.batch_rows) {
    const int64_t rows = std::min(division.batch_rows, p.m - first);
    const int64_t groups = divide_up(rows, kGroup);
    const int64_t tasks = std::min(division.tasks, quantizer_tasks(groups, rows * p.k, threads));
    parallel(stream, tasks, [&](int64_t task) {
      const RowScratch own(scratch + task * division.scratch_bytes, p.k);
      const Range range = Range::of(groups, 1, tasks, task);
      for (int64_t group = range.begin; group < range.end; ++group) {
        const int64_t start = group * kGroup;
        source.pack(level, division, first + start, std::min(kGroup, rows - start), p.k, own,
                    scales + start, packed + group * division.group_bytes);
      }
    });
    const float* found = scales;
    if (quantize == nullptr) found = p.x_per_token ? p.x_scale + first : p.x_scale;
    multiply_batch(gemm, level, division, packed, found, first, rows, stream);
  }
  return Status::kSuccess;
}

Status check_gemm(const GemmParams& p) {
  const Status status = check(p, 1);
  if (status != Status::kSuccess) return status;
  // There is no table of tiles to choose from.
  return p.tile >= 0 || p.splits > 1 ? Status::kUnsupportedShape : Status::kSuccess;
}

void fill(const GemmParams& p, GemmPlan* plan) {
  // The level: another thread may choose one before the run, whose workspace would have other
  // sizes.
  plan->tile = sqk_cpu_level();
  plan->splits = 1;
  if (p.m == 0) return;
  plan->launches = 1;
  plan->workspace_bytes = Division(*kernels_of(plan->tile), p.m, p.k, is_w4(p)).workspace_bytes();
}

}  // namespace

Status plan(const GemmParams& params, GemmPlan* plan) {
  *plan = {};
  const Status status = check_gemm(params);
  if (status == Status::kSuccess) fill(params, plan);
  return status;
}

Status gemm_s8(const GemmParams& params, const GemmPlan& plan, cudaStream_t stream) {
  return run(params, plan, nullptr, stream);
}

Status plan(const LinearParams& params, LinearPlan* plan) {
  *plan = {};
  if (params.quantize.m != params.gemm.m || params.quantize.k != params.gemm.k) {
    return Status::kInvalidArgument;
  }
  GemmParams gemm = params.gemm;
  gemm.x_q = nullptr;
  gemm.x_q_stride = gemm.k;
  Status status = check_gemm(gemm);
  if (status == Status::kSuccess) status = check_sources(params.quantize);
  if (status != Status::kSuccess) return status;
  fill(gemm, &plan->gemm);
  plan->fused = 1;
  plan->workspace_bytes = plan->gemm.workspace_bytes;
  return Status::kSuccess;
}

Status linear_s8(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  return run(params.gemm, plan.gemm, &params.quantize, stream);
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
