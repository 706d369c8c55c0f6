// The int8 GEMMs of the experts of a mixture, and the weighted sums of their results. CPU ring: no
// torch, no CUDA.
//
// The rows of an expert make blocks. Blocks of all experts are packed together, and their columns
// are divided among the threads as one piece of work: with a row or two for each expert, as when
// text is generated, every thread reads its share of the weights.
#include "sqk/grouped.h"

#include <algorithm>
#include <cstring>

#include "common/entry.h"
#include "common/valid_grouped.h"
#include "cpu/blocks.h"

namespace sqk {
namespace {

// Rows of an expert that are multiplied together.
struct RowBlock {
  int64_t expert;
  int64_t first, rows;  // of y
  int64_t group;        // of the packed ones of its batch
  Form form;
};

// The sizes and buffers of a call, whatever the offsets are.
struct Division {
  int64_t group_bytes;   // of kGroup packed rows, in any form
  int64_t batch_groups;  // packed before they are multiplied
  int64_t tasks;         // at most, that pack
  int64_t scratch_bytes;

  Division(const Kernels& kernels, const GroupedParams& p) {
    group_bytes = std::max(kernels.packed_bytes(p.k, Form::kRows),
                           kernels.packed_bytes(p.k, Form::kInterleaved));
    const int64_t most = p.m / kGroup + std::min(p.experts, p.m);  // each expert rounds up
    batch_groups = std::min(most, std::max(kWaitingBytes / group_bytes, kMostRows / kGroup));
    tasks = quantizer_tasks(batch_groups, batch_groups * kGroup * p.k, kMostThreads);
    scratch_bytes = RowScratch::bytes(p.k, kGroup);
  }

  int64_t packed_bytes() const { return buffer_bytes(batch_groups * group_bytes); }
  // A batch has at least a group for each block.
  int64_t list_bytes() const { return buffer_bytes(batch_groups * int64_t{sizeof(RowBlock)}); }
  int64_t workspace_bytes() const { return packed_bytes() + list_bytes() + tasks * scratch_bytes; }
};

// The end of expert e's rows, or their beginning for e = -1. Never below `before`, nor beyond m.
int64_t end_of(const GroupedParams& p, int64_t e, int64_t before) {
  return std::clamp<int64_t>(p.offsets[e + 1], before, p.m);
}

// The blocks of all experts, one after the other.
class Blocks {
 public:
  Blocks(const Kernels& kernels, const Division& division, const GroupedParams& p)
      : kernels_(kernels), division_(division), p_(p), row_(end_of(p, -1, 0)), end_(row_) {
    find();
  }

  bool any() const { return row_ < end_; }
  int64_t row() const { return row_; }  // the first that no block has had

  // Takes as many as fit into a batch, and returns their number.
  int64_t take(RowBlock* list) {
    int64_t count = 0, groups = 0;
    while (any()) {
      const int64_t rows = std::min(block_rows_, end_ - row_), own = divide_up(rows, kGroup);
      if (groups + own > division_.batch_groups) break;
      list[count++] = {expert_, row_, rows, groups, form_};
      groups += own;
      row_ += rows;
      if (row_ == end_) find();
    }
    return count;
  }

 private:
  // The next expert with rows, if there is one.
  void find() {
    while (row_ == end_ && expert_ + 1 < p_.experts) end_ = end_of(p_, ++expert_, row_);
    const int64_t rows = end_ - row_;
    if (rows == 0) return;
    form_ = kernels_.form(std::min(rows, kMostRows), p_.k, false);
    block_rows_ = rows_of_blocks(form_, division_.group_bytes, rows);
  }

  const Kernels& kernels_;
  const Division& division_;
  const GroupedParams& p_;
  int64_t expert_ = -1, row_, end_, block_rows_ = 0;
  Form form_ = Form::kRows;
};

void pack_group_of(const Kernels& kernels, const Division& division, const GroupedParams& p,
                   const RowBlock& block, int64_t group, const RowScratch& scratch,
                   uint8_t* packed) {
  const int64_t first = block.first + group * kGroup;
  const int64_t rows = std::min(kGroup, block.rows - group * kGroup);
  const auto row_at = [&](int64_t i) {
    const int64_t row =
        p.rows == nullptr ? first + i : std::clamp<int64_t>(p.rows[first + i], 0, p.x_rows - 1);
    return p.x_q + row * p.x_q_stride;
  };
  pack_group(
      kernels, block.form, p.k, rows, p.rows == nullptr, p.x_q_stride, row_at, scratch,
      packed + block.group * division.group_bytes + group * kernels.packed_bytes(p.k, block.form));
}

void pack_batch(const Kernels& kernels, const Division& division, const GroupedParams& p,
                const RowBlock* list, int64_t count, int8_t* scratch, uint8_t* packed,
                cudaStream_t stream) {
  const int64_t groups = list[count - 1].group + divide_up(list[count - 1].rows, kGroup);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += list[i].rows;
  const int64_t threads = std::min(thread_count(stream), kMostThreads);
  const int64_t tasks = std::min(division.tasks, quantizer_tasks(groups, rows * p.k, threads));
  parallel(stream, tasks, [&](int64_t task) {
    const RowScratch own(scratch + task * division.scratch_bytes, p.k);
    const Range range = Range::of(groups, 1, tasks, task);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t size = divide_up(list[i].rows, kGroup);
      const int64_t begin = std::max(range.begin - list[i].group, int64_t{0});
      const int64_t end = std::min(range.end - list[i].group, size);
      for (int64_t group = begin; group < end; ++group) {
        pack_group_of(kernels, division, p, list[i], group, own, packed);
      }
    }
  });
}

// Reading a row of a weight takes as long as multiplying it by this many rows, or so.
constexpr int64_t kReadingRows = 4;
int64_t column_cost(const RowBlock& block) { return kReadingRows + block.rows; }

// Divides the columns of all blocks among the threads. The bits do not depend on how: every sum is
// exact.
void multiply_batch(const Kernels& kernels, const Division& division, const GroupedParams& p,
                    const RowBlock* list, int64_t count, const uint8_t* packed,
                    cudaStream_t stream) {
  GemmParams shared = {};
  shared.m = p.m;
  shared.n = p.n;
  shared.k = p.k;
  shared.w_q_stride = p.w_q_stride;
  shared.x_per_token = p.x_per_token;
  shared.w_per_channel = 1;
  shared.y = p.y;
  shared.y_stride = p.y_stride;
  shared.y_dtype = p.y_dtype;
  int64_t cost = 0;
  for (int64_t i = 0; i < count; ++i) cost += column_cost(list[i]) * p.n;
  const int64_t tasks = std::min(thread_count(stream), count * p.n);
  parallel(stream, tasks, [&](int64_t task) {
    const Range range = Range::of(cost, 1, tasks, task);
    GemmParams gemm = shared;
    int64_t start = 0;  // the cost before a block
    for (int64_t i = 0; i < count && start < range.end; ++i) {
      const RowBlock& own = list[i];
      const int64_t each = column_cost(own), unit = kernels.columns(own.form);
      // The column at which a task takes over from the one before.
      const auto column_at = [&](int64_t position) {
        if (position >= start + each * p.n) return p.n;
        return std::max(position - start, int64_t{0}) / each / unit * unit;
      };
      Block block = {};
      block.first_column = column_at(range.begin);
      block.last_column = column_at(range.end);
      start += each * p.n;
      if (block.first_column == block.last_column) continue;
      gemm.w_q = p.w_q + own.expert * p.w_q_expert_stride;
      gemm.w_scale = p.w_scale + own.expert * p.n;
      gemm.bias = p.bias == nullptr ? nullptr : p.bias + own.expert * p.n;
      block.gemm = &gemm;
      block.x = packed + own.group * division.group_bytes;
      block.first_row = own.first;
      block.rows = own.rows;
      block.x_scale = p.x_per_token ? p.x_scale + own.first : p.x_scale;
      kernels.multiply(block, own.form);
    }
  });
}

// The rows [first, last) belong to no expert.
void clear_rows(const GroupedParams& p, int64_t first, int64_t last, cudaStream_t stream) {
  const int64_t bytes = size_in_bytes(p.y_dtype), rows = last - first;
  const int64_t tasks = quantizer_tasks(rows, rows * p.n, thread_count(stream));
  parallel(stream, tasks, [&](int64_t task) {
    const Range range = Range::of(rows, 1, tasks, task);
    for (int64_t row = first + range.begin; row < first + range.end; ++row) {
      std::memset(static_cast<char*>(p.y) + row * p.y_stride * bytes, 0,
                  static_cast<size_t>(p.n * bytes));
    }
  });
}

}  // namespace

Status plan(const GroupedParams& params, GroupedPlan* plan) {
  *plan = {};
  const Status status = check(params, 1);
  if (status != Status::kSuccess) return status;
  if (params.tile >= 0) return Status::kUnsupportedShape;  // there is no table of tiles
  plan->tile = sqk_cpu_level();  // another thread may choose one before the run
  if (params.m == 0) return Status::kSuccess;
  plan->launches = 1;
  plan->workspace_bytes = Division(*kernels_of(plan->tile), params).workspace_bytes();
  return Status::kSuccess;
}

Status grouped_gemm_s8(const GroupedParams& p, const GroupedPlan& plan, cudaStream_t stream) {
  if (plan.launches == 0) return Status::kSuccess;
  const Kernels* const level = kernels_of(plan.tile);
  if (level == nullptr || !has_operands(p)) return Status::kInvalidArgument;
  const Division division(*level, p);
  if (p.workspace_bytes < division.workspace_bytes()) return Status::kWorkspaceTooSmall;
  if (p.workspace == nullptr) return Status::kInvalidArgument;
  auto* const packed = static_cast<uint8_t*>(p.workspace);
  auto* const list = reinterpret_cast<RowBlock*>(packed + division.packed_bytes());
  auto* const scratch =
      static_cast<int8_t*>(p.workspace) + division.packed_bytes() + division.list_bytes();

  Blocks blocks(*level, division, p);
  clear_rows(p, 0, end_of(p, -1, 0), stream);
  while (blocks.any()) {
    const int64_t count = blocks.take(list);
    pack_batch(*level, division, p, list, count, scratch, packed, stream);
    multiply_batch(*level, division, p, list, count, packed, stream);
  }
  clear_rows(p, blocks.row(), p.m, stream);
  return Status::kSuccess;
}

Status combine_experts(const CombineParams& p, cudaStream_t stream) {
  const Status status = check(p);
  if (status != Status::kSuccess || p.tokens == 0) return status;
  const Kernels& level = kernels();
  const int64_t tasks = quantizer_tasks(p.tokens, p.tokens * p.choices * p.n, thread_count(stream));
  parallel(stream, tasks, [&](int64_t task) {
    const Range range = Range::of(p.tokens, 1, tasks, task);
    for (int64_t token = range.begin; token < range.end; ++token) level.combine(p, token);
  });
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_grouped_gemm_s8(const sqk::GroupedParams* params, void* stream) {
  return sqk::plan_and_run(*params, stream, &sqk::grouped_gemm_s8);
}

extern "C" int32_t sqk_grouped_plan(const sqk::GroupedParams* params, sqk::GroupedPlan* plan) {
  return static_cast<int32_t>(sqk::plan(*params, plan));
}

extern "C" int32_t sqk_combine_experts(const sqk::CombineParams* params, void* stream) {
  return static_cast<int32_t>(sqk::combine_experts(*params, static_cast<cudaStream_t>(stream)));
}
