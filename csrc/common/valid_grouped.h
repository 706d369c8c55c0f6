// What the comments of grouped.h allow, in plain C++: plans for GPUs and for CPUs use it.
#pragma once

#include "common/valid.h"
#include "sqk/grouped.h"

namespace sqk {

// `alignment`: as for a GEMM. The weights of the experts must not overlap. The values of offsets
// and rows may be on a device, so nothing here reads them.
inline Status check(const GroupedParams& p, int64_t alignment) {
  if (p.m < 0 || p.n < 1 || p.k < 1 || p.experts < 1 || p.m > kMaxSide || p.n > kMaxSide ||
      p.k > kMaxGemmK || p.experts > kMaxExperts || p.x_rows > kMaxSide || !is_float(p.y_dtype) ||
      p.tile < -1) {
    return Status::kInvalidArgument;
  }
  // Without elements `rows` may have no address.
  if (p.x_rows < 0 || (p.m > 0 && (p.rows == nullptr ? p.x_rows != p.m : p.x_rows < 1))) {
    return Status::kInvalidArgument;
  }
  if (p.x_q_stride >= kMaxStride || p.w_q_stride >= kMaxStride ||
      p.w_q_expert_stride >= kMaxStride) {
    return Status::kInvalidArgument;
  }
  const int64_t of_expert = p.n > 1 ? (p.n - 1) * p.w_q_stride + p.k : p.k;
  if ((p.x_rows > 1 && p.x_q_stride < p.k) || (p.n > 1 && p.w_q_stride < p.k) ||
      (p.experts > 1 && p.w_q_expert_stride < of_expert) || (p.m > 1 && p.y_stride < p.n) ||
      !are_rows_aligned(p.x_q, p.x_q_stride, p.x_rows, alignment) ||
      !are_rows_aligned(p.w_q, p.w_q_stride, p.n, alignment) ||
      !are_rows_aligned(p.w_q, p.w_q_expert_stride, p.experts, alignment)) {
    return Status::kInvalidArgument;
  }
  return Status::kSuccess;
}

// A plan does not need them.
inline bool has_operands(const GroupedParams& p) {
  return p.x_q != nullptr && p.offsets != nullptr && p.w_q != nullptr && p.x_scale != nullptr &&
         p.w_scale != nullptr && p.y != nullptr;
}

inline Status check(const CombineParams& p) {
  if (p.tokens < 0 || p.choices < 1 || p.n < 1 || !is_float(p.dtype) ||
      !is_float(p.weights_dtype)) {
    return Status::kInvalidArgument;
  }
  if (p.tokens > 0 && (p.y_rows < 1 || p.y == nullptr || p.position == nullptr ||
                       p.weights == nullptr || p.out == nullptr)) {
    return Status::kInvalidArgument;
  }
  // Rows that are only read may overlap.
  if ((p.y_rows > 1 && p.y_stride < 0) || (p.tokens > 1 && p.out_stride < p.n)) {
    return Status::kInvalidArgument;
  }
  return p.tokens <= kMaxRows && p.y_rows <= kMaxSide && p.n <= kMaxChannels &&
                 p.choices <= kMaxChannels
             ? Status::kSuccess
             : Status::kUnsupportedShape;
}

}  // namespace sqk
