// Binding of csrc/quantize: the producers of int8 activations. Schemas, fakes and CPU kernels are
// in smoothquant_kernels/ops/.
#include "sqk/quantize.h"

#include <string>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "common/arithmetic.h"
#include "kinds.h"

namespace sqk {
namespace {

// The arguments that all four ops take after their own.
struct Target {
  const MaybeTensor& inv_smooth;
  const MaybeTensor& scale;
  Text granularity;
  int64_t k_multiple;
  int64_t rotation;
};

// Allocates x_q, x_scale and the workspace, and launches. `params` has the producer and its inputs;
// the tensors that they point into must outlive the call.
std::tuple<Tensor, Tensor> run(const char* op, const Tensor& x, int64_t k, const Target& target,
                               QuantizeParams params) {
  check_quantizer(op, x, k, target.inv_smooth, target.scale, target.granularity.view(),
                  target.rotation, params);
  SQK_CHECK(target.k_multiple >= 1, op, ": k_multiple must be at least 1, got ", target.k_multiple,
            ".");
  constexpr int64_t kLargestMultiple = int64_t{1} << 20;
  SQK_CHECK(target.k_multiple <= kLargestMultiple, op, ": k_multiple must be at most ",
            kLargestMultiple, ", got ", target.k_multiple, ".");
  params.k_padded = round_up(k, target.k_multiple);

  const Launch launch(x);
  const MaybeTensor inv_smooth = dense(target.inv_smooth);
  if (inv_smooth) {
    params.inv_smooth = floats(*inv_smooth);
  }
  if (target.scale) params.scale = floats(*target.scale);
  Tensor x_q = new_rows(x, params.k_padded, ScalarType::Char);
  Tensor x_scale =
      new_vector(x, params.scheme == Scheme::kPerTensor ? 1 : params.m, ScalarType::Float);
  params.x_q = static_cast<int8_t*>(x_q.mutable_data_ptr());
  params.x_q_stride = params.k_padded;
  params.x_scale = static_cast<float*>(x_scale.mutable_data_ptr());
  QuantizePlan plan;
  Status status = sqk::plan(params, &plan);
  MaybeTensor workspace;
  if (status == Status::kSuccess) {
    params.workspace_bytes = plan.workspace_bytes;
    params.workspace = make_workspace(x, plan.workspace_bytes, workspace);
    status = quantize(params, plan, launch.stream());
  }
  SQK_CHECK(status == Status::kSuccess, op, ": ", describe(status), "; x ", shape_text(x), " ",
            dtype_name(x.scalar_type()));
  return {x_q, x_scale};
}

std::tuple<Tensor, Tensor> quantize_op(const Tensor& x, const MaybeTensor& inv_smooth,
                                       const MaybeTensor& scale, StringHandle granularity,
                                       int64_t k_multiple, int64_t rotation) {
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  check_activation_input("quantize", x);
  QuantizeParams params = {};
  params.producer = Producer::kQuantize;
  const Rows rows(x);
  params.x = rows.data;
  params.x_stride = rows.stride;
  return run("quantize", x, x.size(x.dim() - 1), target, params);
}

// Checks a tensor that is combined with x element by element.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  SQK_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must be ",
            dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()), ".");
  check_device(op, name, tensor, x);
  SQK_CHECK(same_shape(tensor, x), op, ": ", name, " must have x's shape ", tuple_text(x), ", got ",
            tuple_text(tensor), ".");
}

void check_norm_parameter(const char* op, const char* name, const MaybeTensor& tensor,
                          const Tensor& x) {
  if (!tensor) return;
  const int64_t k = x.size(x.dim() - 1);
  check_float(op, name, *tensor);
  check_device(op, name, *tensor, x);
  SQK_CHECK(tensor->dim() == 1 && tensor->size(0) == k, op, ": ", name, " must have shape [", k,
            "], got ", tuple_text(*tensor), ".");
}

std::tuple<Tensor, Tensor, Tensor> norm_op(const char* op, Producer producer, const Tensor& x,
                                           const MaybeTensor& weight, const MaybeTensor& bias,
                                           double eps, const MaybeTensor& residual,
                                           const Target& target) {
  check_activation_input(op, x);
  check_norm_parameter(op, "weight", weight, x);
  check_norm_parameter(op, "bias", bias, x);
  if (residual) check_like(op, "residual", *residual, x);
  const Launch launch(x);  // copies of tensors that are not contiguous need the device too
  const MaybeTensor w = dense(weight), b = dense(bias);
  QuantizeParams params = {};
  params.producer = producer;
  params.eps = eps;
  const Rows rows(x);
  params.x = rows.data;
  params.x_stride = rows.stride;
  if (w) {
    params.weight = w->const_data_ptr();
    params.weight_dtype = to_dtype(w->scalar_type());
  }
  if (b) {
    params.bias = b->const_data_ptr();
    params.bias_dtype = to_dtype(b->scalar_type());
  }
  std::optional<Rows> added;
  Tensor sum = residual ? new_rows(x, x.size(x.dim() - 1), x.scalar_type())
                        : new_vector(x, 0, x.scalar_type());
  if (residual) {
    added.emplace(*residual);
    params.residual = added->data;
    params.residual_stride = added->stride;
    params.sum = sum.mutable_data_ptr();
    params.sum_stride = x.size(x.dim() - 1);
  }
  auto [x_q, x_scale] = run(op, x, x.size(x.dim() - 1), target, params);
  return {x_q, x_scale, sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_op(const Tensor& x, const Tensor& weight,
                                                        double eps, const MaybeTensor& residual,
                                                        const MaybeTensor& inv_smooth,
                                                        const MaybeTensor& scale,
                                                        StringHandle granularity,
                                                        int64_t k_multiple, int64_t rotation) {
  return norm_op("rms_norm_quantize", Producer::kRmsNorm, x, weight, std::nullopt, eps, residual,
                 {inv_smooth, scale, Text(granularity), k_multiple, rotation});
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantize_op(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
    const MaybeTensor& residual, const MaybeTensor& inv_smooth, const MaybeTensor& scale,
    StringHandle granularity, int64_t k_multiple, int64_t rotation) {
  return norm_op("layer_norm_quantize", Producer::kLayerNorm, x, weight, bias, eps, residual,
                 {inv_smooth, scale, Text(granularity), k_multiple, rotation});
}

std::tuple<Tensor, Tensor> act_quantize_op(const Tensor& x, StringHandle kind_handle,
                                           const MaybeTensor& gate, const MaybeTensor& inv_smooth,
                                           const MaybeTensor& scale, StringHandle granularity,
                                           int64_t k_multiple, int64_t rotation) {
  const char* const op = "act_quantize";
  const Text kind_text(kind_handle);
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  const std::string_view kind_name = kind_text.view();
  const Kind& kind = find_kind(op, kind_name, false);
  check_activation_input(op, x);
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t k = kind.fused ? columns / 2 : columns;
  QuantizeParams params = {};
  params.producer = kind.producer;
  const Rows rows(x);
  params.x = rows.data;
  params.x_stride = rows.stride;
  std::optional<Rows> gates;
  if (kind.fused) {
    SQK_CHECK(!gate, op, ": kind '", kind_name,
              "' reads gate and up from one x [..., 2K]; drop `gate`.");
    SQK_CHECK(columns % 2 == 0, op, ": kind '", kind_name,
              "' needs x [..., 2K], got an odd size: ", tuple_text(x), ".");
    params.gate = rows.data;
    params.gate_stride = rows.stride;
    const int64_t offset = k * size_in_bytes(to_dtype(x.scalar_type()));
    params.x = static_cast<const char*>(rows.data) + offset;
  } else if (gate) {
    check_like(op, "gate", *gate, x);
    gates.emplace(*gate);
    params.gate = gates->data;
    params.gate_stride = gates->stride;
  }
  return run(op, x, k, target, params);
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("quantize", TORCH_BOX(&sqk::quantize_op));
  m.impl("rms_norm_quantize", TORCH_BOX(&sqk::rms_norm_quantize_op));
  m.impl("layer_norm_quantize", TORCH_BOX(&sqk::layer_norm_quantize_op));
  m.impl("act_quantize", TORCH_BOX(&sqk::act_quantize_op));
}
