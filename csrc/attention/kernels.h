// What the launcher and the kernels of the attention share. Kernel ring: no torch.
#pragma once

#include "attention/params.h"
#include "cutlass/fast_math.h"

namespace sqk {

struct DecodeParams {
  AttentionParams a;
  int32_t splits;
  int32_t group;          // query heads of a head of keys
  int32_t columns;        // group * tokens
  int32_t column_groups;  // of a head of keys
  int32_t window;         // 0: none
  int32_t pitch;          // bytes of a row of the cache
  int64_t holding;        // capacity(a.cache)
  cutlass::FastDivmod block_size;
  uint32_t* tickets;  // [groups], 0 before the launch and after it; for splits > 1
  float2* stats;      // [groups, splits, columns of a block]: maximum, sum of weights
  float* partials;    // the same, and channels: means of the values
};

using DecodeKernel = void (*)(DecodeParams);

// A shape without a file in instances/ does not link.
template <int kDim>
DecodeKernel decode_kernel_for(int columns);

}  // namespace sqk
