// The paths of the int8 producers: the longest row of each, and when each is taken. Kernel ring: no
// torch. The one place to change when a measurement says otherwise; nothing here was tuned on a
// GPU.
#pragma once

#include <cstdint>

#include "sqk/quantize.h"

namespace sqk {

constexpr const char* name(QuantizePath path) {
  switch (path) {
    case QuantizePath::kAuto:
      return "auto";
    case QuantizePath::kWarp:
      return "warp";
    case QuantizePath::kBlock:
      return "block";
    case QuantizePath::kWide:
      return "wide";
    case QuantizePath::kLong:
      return "long";
    case QuantizePath::kElement:
      return "element";
    case QuantizePath::kCluster:
      return "cluster";
  }
  return "unknown";
}

// The properties of a kernel that its registers depend on.
struct KernelClass {
  QuantizePath path;
  int64_t element_bytes;
  bool norm;
  bool two_launches;
};

// Whether the path has kernels of its own for rotations. In the other paths a rotation costs
// kernels without one a branch.
constexpr bool is_compiled_for_rotations(QuantizePath path) {
  return path == QuantizePath::kElement;
}

// Elements of a row in a thread's registers. Rotations of kElement keep all in shared memory: one
// copy of their long code.
constexpr int floats_per_thread(QuantizePath path, int64_t element_bytes, bool rotates) {
  switch (path) {
    case QuantizePath::kBlock:
    case QuantizePath::kCluster:
      return 8;
    case QuantizePath::kLong:
      return element_bytes == 2 ? 48 : 32;  // float32 inputs in flight need separate registers
    case QuantizePath::kElement:
      return rotates ? 0 : 16;
    default:
      return 32;
  }
}

// The largest group that a path can rotate: elements that the lanes of a warp have at a time. In
// kLong, whose threads take single vectors from shared memory, that is a vector of each lane.
constexpr int largest_rotation(QuantizePath path, int64_t element_bytes) {
  if (path == QuantizePath::kElement) return int{kMaxRotation};
  const int held = path == QuantizePath::kLong ? 32 * static_cast<int>(16 / element_bytes)
                                               : 32 * floats_per_thread(path, element_bytes, true);
  return held < kMaxRotation ? held : int{kMaxRotation};
}

// Vectors of a thread that such a group spans.
constexpr int vectors_together(QuantizePath path, int64_t element_bytes, bool rotates) {
  const int in_a_warp = 32 * static_cast<int>(16 / element_bytes);
  return rotates ? largest_rotation(path, element_bytes) / in_a_warp : 1;
}

// Threads of the largest block. With 1024 threads each has 64 registers, which fit 32 elements and
// the loads in flight only if elements are small and there is little to compute.
constexpr int max_threads(const KernelClass& kernel) {
  switch (kernel.path) {
    case QuantizePath::kBlock:
    case QuantizePath::kCluster:
      return 1024;
    case QuantizePath::kWarp:
      return 128;  // four rows per block: small blocks leave short tails
    case QuantizePath::kWide:
      return kernel.element_bytes == 2 && !kernel.norm && !kernel.two_launches ? 1024 : 512;
    default:
      return 512;
  }
}

// The part of a block's shared memory that reductions and the driver need.
constexpr int64_t kReservedShared = 2048;
constexpr int64_t kNoLimit = int64_t{1} << 40;
constexpr int kClusterThreads = 256;   // per block, if eight blocks are enough
constexpr int64_t kLeastSlice = 2048;  // elements: twice what a warp's registers hold

// The longest row that a kernel can take.
constexpr int64_t capacity(const KernelClass& kernel) {
  const int64_t floats = floats_per_thread(kernel.path, kernel.element_bytes, false);
  switch (kernel.path) {
    case QuantizePath::kWarp:
      return 32 * floats;
    case QuantizePath::kBlock:
    case QuantizePath::kWide:
      return max_threads(kernel) * floats;
    case QuantizePath::kCluster:
      return 8 * max_threads(kernel) * floats;
    default:
      return kNoLimit;
  }
}

// Whether the path is also compiled for the two launches of a per-tensor or split problem.
constexpr bool serves_two_launches(QuantizePath path) {
  return path != QuantizePath::kBlock && path != QuantizePath::kCluster;
}

enum class Serves { kAll, kNorms, kOthers, kPerTensor };

struct PathRule {
  QuantizePath path;
  int64_t least_k, most_k;
  Serves serves;
  int32_t least_rows_per_sm;          // 0: any number of rows
  int32_t most_rows_per_sm_quarters;  // in quarters; 0: any number of rows
  bool splits;                        // each slice of a row gets its own block, in two launches
  const char* when;
  const char* why;
};

// The first rule that applies and whose path can take the problem wins: clusters need Hopper, and
// rows that cannot be read 16 bytes at a time take the last rule. For norms only K counts: their
// sums depend on how the threads share a row, and a token's bits must not depend on the number of
// tokens.
constexpr PathRule kPathRules[] = {
    {QuantizePath::kWarp, 1, 1024, Serves::kPerTensor, 0, 0, false,  //
     "per tensor, K <= 1024", "four rows give one maximum: few maxima for the second launch"},
    {QuantizePath::kWarp, 1, 256, Serves::kNorms, 0, 0, false,  //
     "norms, K <= 256", "32 lanes hold the row in one or two accesses: no block barrier"},
    {QuantizePath::kWarp, 1, 1024, Serves::kOthers, 4, 0, false,  //
     "K <= 1024, M >= 4 per SM", "no block barrier; enough rows to fill the GPU with warps"},
    {QuantizePath::kBlock, 1, 1024, Serves::kAll, 0, 0, false,  //
     "K <= 1024", "up to four warps a row, one access per thread: the shortest chain"},
    {QuantizePath::kCluster, 8192, 65536, Serves::kOthers, 0, 1, false,
     "8192 <= K <= 65536, M <= SMs / 4, Hopper",
     "few long rows: up to 8 SMs read one row, its maximum goes through their shared memory"},
    {QuantizePath::kWide, 16384, kNoLimit, Serves::kOthers, 0, 1, true,  //
     "K >= 16384, M <= SMs / 4",
     "few long rows without clusters: slices fill the SMs, a second launch reads them from L2"},
    {QuantizePath::kBlock, 1, 8192, Serves::kOthers, 0, 8, false,  //
     "K <= 8192, M <= 2 per SM", "one access per thread, and nothing else for the SM to do"},
    {QuantizePath::kWide, 1, 32768, Serves::kAll, 0, 0, false,
     "K <= 32768 (16384: norms, float32, two launches)",
     "64 bytes in flight per thread, several rows per SM, barriers among few warps"},
    {QuantizePath::kLong, 1, kNoLimit, Serves::kAll, 0, 0, false,  //
     "any K",
     "registers hold 24576 16-bit elements, shared memory 24576 more (Ada) to 57344 (H100)"},
    {QuantizePath::kElement, 1, kNoLimit, Serves::kAll, 0, 0, false,
     "rows, parameters or K not in multiples of 16 bytes",
     "narrow accesses of adjacent lanes: the same sectors, more instructions"},
};

constexpr bool rules_hold() {
  for (const PathRule& rule : kPathRules) {
    const bool bounded = rule.most_k <= capacity({rule.path, 2, false, false});
    const bool falls_back = rule.splits;  // to kLong, where the slices are long
    const bool batch_invariant =
        rule.serves == Serves::kOthers ||
        (rule.least_rows_per_sm == 0 && rule.most_rows_per_sm_quarters == 0 && !rule.splits);
    if (!(bounded || falls_back) || !batch_invariant || rule.least_k > rule.most_k) return false;
  }
  return kPathRules[sizeof(kPathRules) / sizeof(kPathRules[0]) - 1].path == QuantizePath::kElement;
}
static_assert(rules_hold(),
              "a rule promises what its path cannot hold, or lets M choose for norms");

}  // namespace sqk
