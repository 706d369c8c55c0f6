// Copies the rows of x_q that experts take next to each other, for kernels whose copies (TMA) need
// them so. Kernel ring: no torch.
#pragma once

#include "common/arithmetic.h"
#include "sqk/grouped.h"

namespace sqk {

// Between rows in the workspace, and all of them, in bytes.
constexpr int64_t gathered_stride(int64_t k) { return round_up(k, int64_t{128}); }
constexpr int64_t gathered_bytes(const GroupedParams& params) {
  return params.rows == nullptr ? 0 : params.m * gathered_stride(params.k);
}

// To the start of the workspace. Rows of no expert are left out.
Status gather_rows(const GroupedParams& params, bool overlap, cudaStream_t stream);

}  // namespace sqk
