// Chooses the path of a problem: applies the rules of table.h. Kernel ring: no torch; this file
// needs no CUDA compiler and no GPU.
#include <algorithm>
#include <iterator>

#include "common/arithmetic.h"
#include "common/valid.h"
#include "quantize/table.h"
#include "sqk/quantize.h"

namespace sqk {
namespace {

// Null counts as aligned: the operand is not given.
bool aligned(const void* rows, int64_t stride_bytes, int64_t count, int64_t bytes) {
  return rows == nullptr || are_rows_aligned(rows, stride_bytes, count, bytes);
}

// Whether every row and its parameters can be accessed in whole 16-byte vectors.
bool can_vectorize(const QuantizeParams& p) {
  const int64_t size = size_in_bytes(p.dtype), vec = 16 / size;
  return p.k % vec == 0 && aligned(p.x, p.x_stride * size, p.m, 16) &&
         aligned(p.gate, p.gate_stride * size, p.m, 16) &&
         aligned(p.residual, p.residual_stride * size, p.m, 16) &&
         (p.residual == nullptr || aligned(p.sum, p.sum_stride * size, p.m, 16)) &&
         aligned(p.x_q, p.x_q_stride, p.m, vec) && aligned(p.inv_smooth, 0, 1, 16) &&
         aligned(p.weight, 0, 1, std::min<int64_t>(16, vec * size_in_bytes(p.weight_dtype))) &&
         aligned(p.bias, 0, 1, std::min<int64_t>(16, vec * size_in_bytes(p.bias_dtype)));
}

bool serves(Serves who, const QuantizeParams& p) {
  switch (who) {
    case Serves::kAll:
      return true;
    case Serves::kNorms:
      return is_norm(p.producer);
    case Serves::kOthers:
      return !is_norm(p.producer);
    case Serves::kPerTensor:
      return p.scheme == Scheme::kPerTensor;
  }
  return false;
}

KernelClass class_of(QuantizePath path, const QuantizeParams& p, bool two_launches) {
  return {path, size_in_bytes(p.dtype), is_norm(p.producer), two_launches};
}

// Whether a path can take the problem, apart from the length of its rows.
bool can_serve(QuantizePath path, const QuantizeParams& p, const Device& device, bool vectors) {
  return (vectors || path == QuantizePath::kElement) &&
         (path != QuantizePath::kCluster || has_clusters(device)) &&
         p.rotation <= largest_rotation(path, size_in_bytes(p.dtype)) &&
         (p.scheme != Scheme::kPerTensor || serves_two_launches(path));
}

bool applies(const PathRule& rule, const QuantizeParams& p, const Device& device) {
  return p.k >= rule.least_k && p.k <= rule.most_k && serves(rule.serves, p) &&
         (rule.least_rows_per_sm == 0 || p.m >= int64_t{rule.least_rows_per_sm} * device.sms) &&
         (rule.most_rows_per_sm_quarters == 0 ||
          4 * p.m <= int64_t{rule.most_rows_per_sm_quarters} * device.sms);
}

const PathRule& find_rule(const QuantizeParams& p, const Device& device, bool vectors) {
  for (const PathRule& rule : kPathRules) {
    const bool two = p.scheme == Scheme::kPerTensor;
    const bool fits = rule.splits || p.k <= capacity(class_of(rule.path, p, two));
    if (fits && can_serve(rule.path, p, device, vectors) && applies(rule, p, device)) return rule;
  }
  return *(std::end(kPathRules) - 1);
}

}  // namespace

Status plan_quantize(const QuantizeParams& p, const Device& device, QuantizePlan* plan) {
  *plan = QuantizePlan{};
  const Status status = check(p);
  if (status != Status::kSuccess) return status;
  const bool vectors = can_vectorize(p);
  const bool per_tensor = p.scheme == Scheme::kPerTensor;
  QuantizePath path = p.path;
  int splits = 1;
  if (path == QuantizePath::kAuto) {
    const PathRule& rule = find_rule(p, device, vectors);
    path = rule.path;
    if (rule.splits && p.m > 0) {
      const int64_t most = std::min<int64_t>(device.sms / p.m, p.k / kLeastSlice);
      splits = static_cast<int>(std::max<int64_t>(1, most));
    }
  } else if (!can_serve(path, p, device, vectors) ||
             p.k > capacity(class_of(path, p, per_tensor))) {
    return Status::kUnsupportedShape;
  }

  const int vec = static_cast<int>(16 / size_in_bytes(p.dtype));
  // Slices start at whole vectors and groups. Multiples of 256 elements also keep the sectors of
  // the int8 rows whole.
  const int64_t unit = splits == 1 ? vec : std::max(256, p.rotation);
  const int64_t slice = round_up(divide_up(p.k, splits), unit);
  splits = static_cast<int>(divide_up(p.k, slice));
  const bool two = per_tensor || splits > 1;
  // The rule splits rows, but not into enough slices.
  if (slice > capacity(class_of(path, p, two))) {
    const bool fits_long = can_serve(QuantizePath::kLong, p, device, vectors);
    path = fits_long ? QuantizePath::kLong : QuantizePath::kElement;
  }
  const int most_threads = max_threads(class_of(path, p, two));
  const bool rotates = p.rotation != 0;
  const int floats = floats_per_thread(path, size_in_bytes(p.dtype), rotates);
  plan->path = path;
  plan->cluster = 1;
  plan->rows = 1;
  plan->splits = splits;
  plan->slice = static_cast<int32_t>(slice);
  if (path == QuantizePath::kWarp) {
    plan->threads = most_threads;
    plan->rows = plan->threads / 32;
  } else {
    // Unaligned rows get eight elements per thread, like short rows.
    int64_t threads = divide_up(slice, path == QuantizePath::kElement ? 8 : floats);
    if (path == QuantizePath::kCluster) {
      plan->cluster = 2;
      while (plan->cluster < 8 && threads > plan->cluster * kClusterThreads) plan->cluster *= 2;
      threads = divide_up(threads, plan->cluster);
    }
    plan->threads = static_cast<int>(std::min<int64_t>(round_up(threads, 32), most_threads));
  }
  if (path == QuantizePath::kLong || path == QuantizePath::kElement) {
    const int64_t vectors_per_thread = divide_up(divide_up(slice, vec), plan->threads);
    const int64_t slot_bytes = int64_t{4} * vec * plan->threads;
    const int64_t room = std::max<int64_t>(0, device.shared_bytes - kReservedShared) / slot_bytes;
    const int64_t wanted = std::max<int64_t>(0, vectors_per_thread - floats / vec);
    const int together = vectors_together(path, size_in_bytes(p.dtype), rotates);
    plan->slots =
        static_cast<int>(std::min(room / together * together, round_up(wanted, together)));
    plan->shared_bytes = plan->slots * slot_bytes;
  }

  const int64_t teams = divide_up(p.m * splits, plan->rows);
  // Per tensor, every block reads the maxima of all blocks. So only as many blocks are launched as
  // are resident at a time, and each takes several rows.
  const int64_t resident = device.sms * std::clamp<int64_t>(1024 / plan->threads, 1, 8);
  plan->blocks = (per_tensor ? std::min(teams, resident) : teams) * plan->cluster;
  plan->launches = p.m == 0 ? (per_tensor ? 1 : 0) : (two ? 2 : 1);
  if (p.m > 0 && two) {
    plan->workspace_bytes = 4 * (per_tensor ? plan->blocks : p.m * splits);
  }
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_quantize_plan(const sqk::QuantizeParams* params, const sqk::Device* device,
                                     sqk::QuantizePlan* plan) {
  sqk::Device here;
  if (device == nullptr) {
    const sqk::Status status = sqk::current_device(&here);
    if (status != sqk::Status::kSuccess) return static_cast<int32_t>(status);
    device = &here;
  }
  return static_cast<int32_t>(sqk::plan_quantize(*params, *device, plan));
}
