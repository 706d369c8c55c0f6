// Into how many parts a sequence is split. Kernel ring: no torch; this file needs no CUDA compiler
// and no GPU.
#include <algorithm>

#include "attention/params.h"
#include "common/tickets.h"
#include "sqk/quantize.h"

namespace sqk {
namespace {

constexpr int64_t kMaxSplits = 64;  // one block merges them
constexpr int64_t kMaxBlocks = int64_t{1} << 31;
constexpr int64_t kReservedOfBlock = 1024;  // shared memory that the driver keeps
// Blocks of 8 columns run at 4 to an SM, others at 2 (registers; the kernel's launch bounds).
constexpr int64_t most_resident(const DecodeShape& shape) { return shape.columns == 8 ? 4 : 2; }
// A plan with fewer splits is preferred until another fills the GPU better by this factor.
constexpr double kWorthSplitting = 1.1;

bool is_half_valid(const KvHalf& half, const float* smooth, int32_t rotation) {
  constexpr int64_t kPiece = 16;
  return (half.scale != nullptr || (smooth != nullptr && rotation == 0)) && half.data != nullptr &&
         is_aligned(half.data, kPiece) && half.block_stride % kPiece == 0 &&
         half.head_stride % kPiece == 0;
}

Status check(const AttentionParams& p) {
  const KvCache& cache = p.cache;
  if (!is_float(p.dtype) || p.batch < 0 || p.tokens < 0 || p.tokens > kMaxQueryTokens ||
      cache.heads < 1 || p.heads < 1 || p.heads % cache.heads != 0 || cache.blocks < 0 ||
      cache.block_size < 0 || cache.k.dim < 1 || cache.k.dim > kMaxHead ||
      cache.v.dim != cache.k.dim || !fits_rotation(p.rotation, cache.k.dim) || p.window < 0 ||
      (cache.ring != 0 && cache.table != nullptr) ||
      (cache.table == nullptr && cache.blocks < p.batch)) {
    return Status::kInvalidArgument;
  }
  // Without elements a tensor may have no address.
  if (p.batch == 0 || p.tokens == 0) return Status::kSuccess;
  const bool holds = cache.blocks > 0 && capacity(cache) > 0;
  if (holds && (!is_half_valid(cache.k, p.k_smooth, p.rotation) ||
                !is_half_valid(cache.v, p.v_smooth, p.rotation))) {
    return Status::kInvalidArgument;
  }
  return capacity(cache) <= kMostPositions && cache.blocks < kMaxBlocks ? Status::kSuccess
                                                                        : Status::kUnsupportedShape;
}

// The fewest splits with which the blocks fill the GPU's waves nearly as well as with any.
int64_t choose_splits(int64_t groups, int64_t chunks, int64_t resident) {
  if (groups > kTickets) return 1;
  const int64_t most = std::clamp<int64_t>(chunks, 1, kMaxSplits);
  const auto filled = [&](int64_t splits) {
    const int64_t blocks = groups * splits;
    return static_cast<double>(blocks) /
           static_cast<double>(divide_up(blocks, resident) * resident);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (filled(splits) > kWorthSplitting * filled(best)) best = splits;
  }
  return best;
}

}  // namespace

Status plan_attention(const AttentionParams& params, const Device& device, AttentionPlan* plan) {
  *plan = AttentionPlan{};
  const Status status = check(params);
  if (status != Status::kSuccess || params.batch == 0 || params.tokens == 0) return status;
  if (device.capability < 80) return Status::kUnsupportedArch;
  const DecodeShape shape = decode_shape(params.cache.k.dim, decode_columns(params));
  const int64_t groups = decode_groups(params, shape);
  if (groups >= kMaxBlocks / kMaxSplits) return Status::kUnsupportedShape;
  plan->threads = kDecodeThreads;
  plan->shared_bytes = decode_shared_bytes(shape);
  if (plan->shared_bytes + kReservedOfBlock > device.shared_bytes) return Status::kUnsupportedArch;
  const int64_t per_sm = std::clamp<int64_t>(
      (device.shared_bytes + kReservedOfBlock) / (plan->shared_bytes + 2 * kReservedOfBlock), 1,
      most_resident(shape));
  const int64_t chunks = divide_up(capacity(params.cache), int64_t{kChunkTokens});
  plan->splits = static_cast<int32_t>(choose_splits(groups, chunks, per_sm * device.sms));
  plan->blocks = groups * plan->splits;
  plan->workspace_bytes = decode_workspace_bytes(shape, groups, plan->splits);
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_attention_plan(const sqk::AttentionParams* params, const sqk::Device* device,
                                      sqk::AttentionPlan* plan) {
  sqk::Device here;
  if (device == nullptr) {
    const sqk::Status status = sqk::current_device(&here);
    if (status != sqk::Status::kSuccess) return static_cast<int32_t>(status);
    device = &here;
  }
  return static_cast<int32_t>(sqk::plan_attention(*params, *device, plan));
}
