// What the comments of the public headers allow, in plain C++: plans for GPUs and for CPUs use it.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/gemm.h"
#include "sqk/grouped.h"
#include "sqk/quantize.h"

namespace sqk {

constexpr int64_t kMaxChannels = int64_t{1} << 30;  // positions in a row are 32-bit
constexpr int64_t kMaxRows = int64_t{1} << 27;      // 8 blocks per row are a valid grid
constexpr int64_t kMaxSide = int64_t{1} << 30;      // positions are 32-bit
constexpr int64_t kMaxStride = int64_t{1} << 40;    // the limit of a tensor map

// Apart from the results x_q and x_scale, which a fused layer may leave out.
inline Status check_sources(const QuantizeParams& p) {
  const auto producer = static_cast<int32_t>(p.producer);
  const auto path = static_cast<int32_t>(p.path);
  if (producer < 0 || producer >= kProducers || path < -1 || path >= kQuantizePaths ||
      !is_float(p.dtype) || p.scheme < Scheme::kPerToken || p.scheme > Scheme::kStatic) {
    return Status::kInvalidArgument;
  }
  const bool norm = is_norm(p.producer);
  if (p.m < 0 || p.k < 1 || (p.scheme == Scheme::kStatic) != (p.scale != nullptr) ||
      (p.gate != nullptr && !is_activation(p.producer)) ||
      (!norm && (p.residual != nullptr || p.weight != nullptr)) ||
      (p.bias != nullptr && p.producer != Producer::kLayerNorm) ||
      (p.residual != nullptr && (p.sum == nullptr || (p.m > 1 && p.sum_stride < p.k))) ||
      (p.weight != nullptr && !is_float(p.weight_dtype)) ||
      (p.bias != nullptr && !is_float(p.bias_dtype)) || (p.m > 0 && p.x == nullptr) ||
      (p.interleaved != 0 && (!is_activation(p.producer) || p.gate != p.x)) ||
      !fits_rotation(p.rotation, p.k)) {
    return Status::kInvalidArgument;
  }
  return p.k <= kMaxChannels && p.m <= kMaxRows ? Status::kSuccess : Status::kUnsupportedShape;
}

inline Status check(const QuantizeParams& p) {
  if (p.k_padded < p.k || (p.m > 1 && p.x_q_stride < p.k_padded) || (p.m > 0 && p.x_q == nullptr) ||
      ((p.m > 0 || p.scheme == Scheme::kPerTensor) && p.x_scale == nullptr)) {
    return Status::kInvalidArgument;
  }
  const Status status = check_sources(p);
  if (status != Status::kSuccess) return status;
  return p.k_padded <= 2 * kMaxChannels ? Status::kSuccess : Status::kUnsupportedShape;
}

inline bool is_gate_valid(const GemmParams& p) {
  if (!is_gated(p)) return true;
  const bool has_kind = p.activation == Producer::kSilu || p.activation == Producer::kGelu ||
                        p.activation == Producer::kGeluTanh;
  return has_kind && p.y_dtype == DType::kInt8 && is_float(p.gate_dtype) && p.relu == 0 &&
         p.n % 2 == 0 && (p.m == 0 || p.y_scale != nullptr);
}

// `alignment`: what the first element of x_q and w_q and the strides of their rows must be
// multiples of, in bytes.
inline Status check(const GemmParams& p, int64_t alignment) {
  const bool int8 = p.y_dtype == DType::kInt8;
  if (p.m < 0 || p.n < 1 || p.k < 1 || p.m > kMaxSide || p.n > kMaxSide || p.k > kMaxGemmK ||
      !is_known(p.y_dtype) || int8 != (p.out_scale != nullptr) || (!int8 && p.relu != 0) ||
      p.splits < 0 || p.tile < -1) {
    return Status::kInvalidArgument;
  }
  if (p.residual != nullptr && (int8 || !is_float(p.residual_dtype))) {
    return Status::kInvalidArgument;
  }
  if (!is_gate_valid(p)) return Status::kInvalidArgument;
  if (is_w4(p) && (is_gated(p) || int8 || !is_aligned(p.w_group, alignment))) {
    return Status::kInvalidArgument;
  }
  const int64_t w_row = is_w4(p) ? kW4Bytes * w4_groups(p.k) : p.k;
  if (p.x_q_stride >= kMaxStride || p.w_q_stride >= kMaxStride) return Status::kInvalidArgument;
  if ((p.m > 1 && p.x_q_stride < p.k) || (p.n > 1 && p.w_q_stride < w_row) ||
      (p.m > 1 && p.y_stride < columns_of_y(p)) ||
      !are_rows_aligned(p.x_q, p.x_q_stride, p.m, alignment) ||
      !are_rows_aligned(p.w_q, p.w_q_stride, p.n, alignment)) {
    return Status::kInvalidArgument;
  }
  return Status::kSuccess;
}

// `alignment` as above. The values of offsets and rows are on the device, so nothing here reads
// them.
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
