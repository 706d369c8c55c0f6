// What the ops that quantize share: their checks, and the parameters of the kernels. Binding ring.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "arguments.h"
#include "sqk/quantize.h"

namespace sqk {

// What the user calls an activation function.
struct Kind {
  const char* name;
  Producer producer;
  bool fused;  // x is [..., 2K]: gate, then up
};
constexpr Kind kKinds[] = {
    {"relu", Producer::kRelu, false},
    {"gelu", Producer::kGelu, false},
    {"gelu_tanh", Producer::kGeluTanh, false},
    {"silu", Producer::kSilu, false},
    {"silu_mul", Producer::kSilu, true},
    {"gelu_mul", Producer::kGelu, true},
    {"gelu_tanh_mul", Producer::kGeluTanh, true},
};

// `others`: kinds of the op that are no activation functions, for the message.
inline const Kind& find_kind(const char* op, std::string_view name, const char* others = "",
                             bool only_fused = false) {
  std::string known = others;
  for (const Kind& kind : kKinds) {
    if (only_fused && !kind.fused) continue;
    if (name == kind.name) return kind;
    known += (known.empty() ? "" : ", ") + std::string(kind.name);
  }
  throw std::runtime_error(concat(op, ": kind must be one of ", known, "; got '", name, "'."));
}

// Plans, allocates the workspace on the device of `like`, and launches.
inline Status run_quantizer(QuantizeParams& params, const Tensor& like, const Launch& launch) {
  QuantizePlan plan;
  const Status status = sqk::plan(params, &plan);
  if (status != Status::kSuccess) return status;
  MaybeTensor workspace;
  params.workspace_bytes = plan.workspace_bytes;
  params.workspace = make_workspace(like, plan.workspace_bytes, workspace);
  return quantize(params, plan, launch.stream());
}

// The arguments of a producer of int8. They must outlive it; it keeps copies of tensors alive.
class Quantizer {
 public:
  // Without a norm or an activation function.
  Quantizer(const char* op, const Tensor& x) : op_(op), x_(x) {
    check_float(op, "x", x);
    SQK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op,
              ": x must have shape [..., K] with K >= 1, got ", tuple_text(x), ".");
    params_.producer = Producer::kQuantize;
    params_.m = Rows::count(x);
    params_.k = x.size(x.dim() - 1);
    params_.dtype = to_dtype(x.scalar_type());
    params_.path = QuantizePath::kAuto;
  }
  Quantizer(const Quantizer&) = delete;
  Quantizer& operator=(const Quantizer&) = delete;

  // `weight_name` and `bias_name` are what the op calls them.
  void set_norm(Producer producer, const char* weight_name, const MaybeTensor& weight,
                const char* bias_name, const MaybeTensor& bias, double eps) {
    check_norm_parameter(weight_name, weight);
    check_norm_parameter(bias_name, bias);
    params_.producer = producer;
    params_.eps = eps;
    weight_ = weight ? &*weight : nullptr;
    bias_ = bias ? &*bias : nullptr;
  }

  // x + residual is what a norm reads.
  void set_residual(const Tensor& residual) {
    check_like("residual", residual);
    residual_ = &residual;
  }

  void set_activation(const Kind& kind, const MaybeTensor& gate) {
    params_.producer = kind.producer;
    halves_ = kind.fused;
    if (!kind.fused) {
      if (gate) check_like("gate", *gate);
      gate_ = gate ? &*gate : nullptr;
      return;
    }
    SQK_CHECK(!gate, op_, ": kind '", kind.name,
              "' reads gate and up from one x [..., 2K]; drop `gate`.");
    SQK_CHECK(params_.k % 2 == 0, op_, ": kind '", kind.name,
              "' needs x [..., 2K], got an odd size: ", tuple_text(x_), ".");
    params_.k /= 2;
  }

  // Call it after the producer is set, which may change K.
  void set_scheme(const MaybeTensor& inv_smooth, const MaybeTensor& scale,
                  std::string_view granularity, int64_t rotation) {
    const int64_t k = params_.k;
    check_vector(op_, "inv_smooth", inv_smooth, x_, k, "one factor per channel of x");
    check_vector(op_, "scale", scale, x_, 1, "a static scale for the whole tensor");
    const bool per_tensor = granularity == "tensor";
    SQK_CHECK(per_tensor || granularity == "token", op_,
              ": granularity must be 'token' or 'tensor', got '", granularity,
              "'; give `scale` for the static scheme.");
    SQK_CHECK(fits_rotation(rotation, k), op_, ": rotation must be 0 or a power of two from 2 to ",
              kMaxRotation, " that divides K = ", k, ", got ", rotation, ".");
    params_.rotation = static_cast<int32_t>(rotation);
    params_.scheme = scale ? Scheme::kStatic : per_tensor ? Scheme::kPerTensor : Scheme::kPerToken;
    if (scale) params_.scale = floats(*scale);
    inv_smooth_ = inv_smooth ? &*inv_smooth : nullptr;
  }

  const char* op() const { return op_; }
  const Tensor& x() const { return x_; }
  QuantizeParams& params() { return params_; }
  int64_t scales() const { return params_.scheme == Scheme::kPerTensor ? 1 : params_.m; }

  // May copy tensors: call it when all arguments have been checked and the device is current.
  void prepare() {
    const Rows& rows = rows_.emplace(x_);
    params_.x = rows.data;
    params_.x_stride = rows.stride;
    if (halves_) {
      params_.gate = rows.data;
      params_.gate_stride = rows.stride;
      params_.x = static_cast<const char*>(rows.data) + params_.k * size_in_bytes(params_.dtype);
    } else if (gate_ != nullptr) {
      const Rows& gates = more_rows_.emplace(*gate_);
      params_.gate = gates.data;
      params_.gate_stride = gates.stride;
    }
    if (weight_ != nullptr) {
      params_.weight = kept_weight_.emplace(dense(*weight_)).const_data_ptr();
      params_.weight_dtype = to_dtype(weight_->scalar_type());
    }
    if (bias_ != nullptr) {
      params_.bias = kept_bias_.emplace(dense(*bias_)).const_data_ptr();
      params_.bias_dtype = to_dtype(bias_->scalar_type());
    }
    if (inv_smooth_ != nullptr) {
      params_.inv_smooth = floats(kept_inv_smooth_.emplace(dense(*inv_smooth_)));
    }
  }

  // For a residual: where x + residual goes. Call it after prepare().
  Tensor make_sum() {
    const Rows& rows = more_rows_.emplace(*residual_);
    params_.residual = rows.data;
    params_.residual_stride = rows.stride;
    Tensor sum = new_rows(x_, params_.k, x_.scalar_type());
    params_.sum = sum.mutable_data_ptr();
    params_.sum_stride = params_.k;
    return sum;
  }

 private:
  // A tensor that is combined with x element by element.
  void check_like(const char* name, const Tensor& tensor) const {
    SQK_CHECK(tensor.scalar_type() == x_.scalar_type(), op_, ": ", name, " must be ",
              dtype_name(x_.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), ".");
    check_device(op_, name, tensor, x_);
    SQK_CHECK(same_shape(tensor, x_), op_, ": ", name, " must have x's shape ", tuple_text(x_),
              ", got ", tuple_text(tensor), ".");
  }

  void check_norm_parameter(const char* name, const MaybeTensor& tensor) const {
    if (!tensor) return;
    check_float(op_, name, *tensor);
    check_device(op_, name, *tensor, x_);
    SQK_CHECK(tensor->dim() == 1 && tensor->size(0) == params_.k, op_, ": ", name,
              " must have shape [", params_.k, "], got ", tuple_text(*tensor), ".");
  }

  const char* op_;
  const Tensor& x_;
  QuantizeParams params_ = {};
  bool halves_ = false;
  const Tensor* weight_ = nullptr;
  const Tensor* bias_ = nullptr;
  const Tensor* residual_ = nullptr;
  const Tensor* gate_ = nullptr;
  const Tensor* inv_smooth_ = nullptr;
  std::optional<Rows> rows_, more_rows_;
  MaybeTensor kept_weight_, kept_bias_, kept_inv_smooth_;
};

}  // namespace sqk
