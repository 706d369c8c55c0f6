// What the GEMM ops share: their checks, and the call of the kernels. Binding ring.
#pragma once

#include <optional>
#include <string>

#include "arguments.h"
#include "common/arithmetic.h"
#include "sqk/gemm.h"

namespace sqk {

// What the rows of x_q and w_q must be aligned to.
#ifdef SQK_CPU
constexpr int64_t kRowAlignment = 1;
#else
constexpr int64_t kRowAlignment = kGemmAlignment;
#endif

// The smallest stride of rows of k int8 elements that keeps every row aligned.
inline int64_t padded(int64_t k) { return round_up(k, kRowAlignment); }

inline void check_int8(const char* op, const char* name, const Tensor& tensor) {
  SQK_CHECK(tensor.scalar_type() == ScalarType::Char, op, ": ", name, " must be int8, got ",
            dtype_name(tensor.scalar_type()), ". Quantize it first (ops.quantize).");
}

// A scale with `size` elements, or with one for all.
inline void check_scale(const char* op, const char* name, const Tensor& scale, const Tensor& like,
                        int64_t size, const char* what) {
  if (scale.dim() == 1 && scale.size(0) == 1) return check_vector(op, name, scale, like, 1, what);
  SQK_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
            dtype_name(scale.scalar_type()), ". Scales and smoothing factors stay in float32.");
  check_device(op, name, scale, like);
  SQK_CHECK(scale.dim() == 1 && scale.size(0) == size, op, ": ", name, " must have shape [", size,
            size == 1 ? "" : "] or [1", "] (", what, "), got ", tuple_text(scale), ".");
}

inline void check_activation(const char* op, const Tensor& x_q, const Tensor& x_scale) {
  check_int8(op, "x_q", x_q);
  check_scale(op, "x_scale", x_scale, x_q, Rows::count(x_q), "per token or per tensor");
}

inline int64_t channels(const Tensor& x_q) { return x_q.dim() ? x_q.size(x_q.dim() - 1) : 0; }

// `x_k`: the channels of the rows to multiply, which may be half of x's.
inline void check_weight(const char* op, const Tensor& x, int64_t x_k, const Tensor& w_q) {
  check_int8(op, "w_q", w_q);
  check_device(op, "w_q", w_q, x);
  SQK_CHECK(x.dim() >= 1 && w_q.dim() == 2 && w_q.size(0) >= 1 && x_k == w_q.size(1), op,
            ": x_q must be [..., K] and w_q [N, K] with the same K and N >= 1, got ",
            x.dim() ? output_shape_text(x, x_k) : tuple_text(x), " and ", tuple_text(w_q), ".");
  const int64_t k = w_q.size(1);
  SQK_CHECK(k >= 1 && k <= kMaxGemmK, op, ": K must be in [1, ", kMaxGemmK,
            "] so that an int32 sum cannot overflow, got ", k, "; split the layer over K.");
}

// A weight of 4 bits, and the steps and offsets of its groups.
inline void check_w4_weight(const char* op, const Tensor& x, int64_t k, const Tensor& w_q4,
                            const Tensor& w_group) {
  SQK_CHECK(w_q4.scalar_type() == ScalarType::Byte, op, ": w_q4 must be uint8, got ",
            dtype_name(w_q4.scalar_type()), ". Pack it first (reference.pack_w4).");
  check_device(op, "w_q4", w_q4, x);
  const int64_t groups = w4_groups(k);
  SQK_CHECK(k >= 1 && w_q4.dim() == 2 && w_q4.size(0) >= 1 && w_q4.size(1) == kW4Bytes * groups, op,
            ": x_q must be [..., K] and w_q4 [N, ", kW4Bytes, " * ceil(K / ", kW4Group,
            ")] with N >= 1, got ", tuple_text(x), " and ", tuple_text(w_q4), ".");
  SQK_CHECK(k <= kMaxGemmK, op, ": K must be in [1, ", kMaxGemmK,
            "] so that an int32 sum cannot overflow, got ", k, "; split the layer over K.");
  check_int8(op, "w_group", w_group);
  check_device(op, "w_group", w_group, x);
  SQK_CHECK(w_group.dim() == 3 && w_group.size(0) == groups && w_group.size(1) == w_q4.size(0) &&
                w_group.size(2) == 2,
            op, ": w_group must have shape (", groups, ", ", w_q4.size(0),
            ", 2), a step and an offset for each group of ", kW4Group, " channels, got ",
            tuple_text(w_group), ".");
}

// The arguments that all GEMM ops have besides their activation. Keeps the tensors alive during the
// call.
class Gemm {
 public:
  // With `w_group`, w_q has 4 bits.
  Gemm(const char* op, const Tensor& x, int64_t x_k, const Tensor& w_q, const Tensor& w_scale,
       const MaybeTensor& bias, const MaybeTensor& residual, ScalarType y_dtype,
       const MaybeTensor& w_group = std::nullopt)
      : op_(op), x_(x) {
    w_group ? check_w4_weight(op, x, x_k, w_q, *w_group) : check_weight(op, x, x_k, w_q);
    params_.m = Rows::count(x);
    params_.n = w_q.size(0);
    params_.k = x_k;
    check_scale(op, "w_scale", w_scale, x, params_.n, "per output channel or per tensor");
    if (bias) {
      check_float(op, "bias", *bias);
      check_device(op, "bias", *bias, x);
      SQK_CHECK(bias->dim() == 1 && bias->size(0) == params_.n, op, ": bias must have shape [",
                params_.n, "], got ", tuple_text(*bias), ".");
    }
    if (residual) check_residual(*residual);
    params_.y_dtype = to_dtype(y_dtype);
    params_.tile = -1;
    w_q_ = w_q;
    w_group_ = w_group;
    w_scale_ = w_scale;
    bias_ = bias;
    residual_ = residual ? &*residual : nullptr;
  }

  GemmParams& params() { return params_; }

  // May copy tensors: call it when all arguments have been checked and the device is current.
  void prepare() {
    params_.w_q = rows_of(*w_q_, w_q_->size(1), params_.w_q_stride, w_rows_);
    if (w_group_) {
      w_group_ = aligned(dense(*w_group_));
      params_.w_group = static_cast<const int8_t*>(w_group_->const_data_ptr());
    }
    w_scale_ = dense(*w_scale_);
    params_.w_scale = floats(*w_scale_);
    params_.w_per_channel = w_scale_->size(0) > 1;
    if (bias_) {
      bias_ = as_float32(*bias_);
      params_.bias = floats(*bias_);
    }
    if (residual_ != nullptr) {
      const Rows& rows = residual_rows_.emplace(*residual_);
      params_.residual = rows.data;
      params_.residual_stride = rows.stride;
      params_.residual_dtype = to_dtype(residual_->scalar_type());
    }
  }

  void set_activation(const Tensor& x_q, const Tensor& x_scale) {
    params_.x_q = rows_of(x_q, params_.k, params_.x_q_stride, x_rows_);
    x_scale_ = dense(x_scale);
    params_.x_scale = floats(*x_scale_);
    params_.x_per_token = x_scale_->size(0) > 1;
  }

  Tensor make_y() {
    params_.y_stride = columns_of_y(params_);
    Tensor y = new_rows(x_, params_.y_stride, to_scalar_type(params_.y_dtype));
    params_.y = y.mutable_data_ptr();
    return y;
  }

  Tensor run(const Launch& launch) {
    Tensor y = make_y();
    check(run_to_y(launch));
    return y;
  }

  // After make_y.
  Status run_to_y(const Launch& launch) {
    GemmPlan plan;
    Status status = sqk::plan(params_, &plan);
    if (status == Status::kSuccess) {
      MaybeTensor workspace;
      params_.workspace_bytes = plan.workspace_bytes;
      params_.workspace = make_workspace(x_, plan.workspace_bytes, workspace);
      status = gemm_s8(params_, plan, launch.stream());
    }
    return status;
  }

  void check(Status status) const {
    SQK_CHECK(
        status == Status::kSuccess, op_, ": ", describe(status), "; M ", params_.m, ", N ",
        params_.n, ", K ", params_.k,
        params_.tile >= 0 ? concat(", tile ", params_.tile, ", splits ", params_.splits) : "");
  }

 private:
  // The tensor itself if one stride leads from each row to the next, else a copy. CUDA kernels load
  // 16 bytes at a time, so for them rows must also be aligned (as with k_multiple = 16 and in
  // packed weights), and a copy is padded.
  const int8_t* rows_of(const Tensor& t, int64_t width, int64_t& stride,
                        std::optional<Rows>& keep) {
    if (Rows::uniform(t)) {
      const Rows& rows = keep.emplace(t);
      const int64_t count = Rows::count(t);
      const bool apart = count <= 1 || rows.stride >= width;
      if (apart && are_rows_aligned(rows.data, rows.stride, count, kRowAlignment)) {
        stride = rows.stride;
        return static_cast<const int8_t*>(rows.data);
      }
    }
    const int64_t last = t.dim() - 1;
    stride = padded(width);
    Tensor copy = new_rows(t, stride, t.scalar_type());
    Tensor columns = torch::stable::narrow(copy, last, 0, width);
    torch::stable::copy_(columns, t);
    return static_cast<const int8_t*>(keep.emplace(copy).data);
  }

  // A copy starts at an aligned address.
  static Tensor aligned(const Tensor& t) {
    return is_aligned(t.const_data_ptr(), kRowAlignment) ? t : torch::stable::clone(t);
  }

  static Tensor as_float32(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Float) return dense(t);
    Tensor copy = new_vector(t, t.size(0), ScalarType::Float);
    return torch::stable::copy_(copy, t);
  }

  void check_residual(const Tensor& residual) const {
    check_float(op_, "residual", residual);
    check_device(op_, "residual", residual, x_);
    const int64_t last = x_.dim() - 1;
    bool fits = residual.dim() == x_.dim() && residual.size(last) == params_.n;
    for (int64_t i = 0; fits && i < last; ++i) fits = residual.size(i) == x_.size(i);
    SQK_CHECK(fits, op_, ": residual must have shape ", output_shape_text(x_, params_.n), ", got ",
              tuple_text(residual), ".");
  }

  const char* op_;
  const Tensor& x_;
  GemmParams params_ = {};
  MaybeTensor w_q_, w_group_, w_scale_, x_scale_, bias_;
  const Tensor* residual_;
  std::optional<Rows> x_rows_, w_rows_, residual_rows_;
};

}  // namespace sqk
