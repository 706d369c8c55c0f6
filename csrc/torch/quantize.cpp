// Binding of csrc/quantize: the producers of int8 activations. Schemas, fakes and CPU kernels are
// in smoothquant_kernels/ops/.
#include "sqk/quantize.h"

#include <tuple>

#include "common/arithmetic.h"
#include "quantize_call.h"

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

// Allocates x_q, x_scale and the workspace, and launches. `quantizer` has been prepared.
std::tuple<Tensor, Tensor> run(Quantizer& quantizer, int64_t k_multiple, const Launch& launch) {
  const Tensor& x = quantizer.x();
  QuantizeParams& params = quantizer.params();
  params.k_padded = round_up(params.k, k_multiple);
  Tensor x_q = new_rows(x, params.k_padded, ScalarType::Char);
  Tensor x_scale = new_vector(x, quantizer.scales(), ScalarType::Float);
  params.x_q = static_cast<int8_t*>(x_q.mutable_data_ptr());
  params.x_q_stride = params.k_padded;
  params.x_scale = static_cast<float*>(x_scale.mutable_data_ptr());
  const Status status = run_quantizer(params, x, launch);
  SQK_CHECK(status == Status::kSuccess, quantizer.op(), ": ", describe(status), "; x ",
            shape_text(x), " ", dtype_name(x.scalar_type()));
  return {x_q, x_scale};
}

void set_target(Quantizer& quantizer, const Target& target) {
  quantizer.set_scheme(target.inv_smooth, target.scale, target.granularity.view(), target.rotation);
  SQK_CHECK(target.k_multiple >= 1, quantizer.op(), ": k_multiple must be at least 1, got ",
            target.k_multiple, ".");
  constexpr int64_t kLargestMultiple = int64_t{1} << 20;
  SQK_CHECK(target.k_multiple <= kLargestMultiple, quantizer.op(), ": k_multiple must be at most ",
            kLargestMultiple, ", got ", target.k_multiple, ".");
}

std::tuple<Tensor, Tensor> run(Quantizer& quantizer, const Target& target) {
  set_target(quantizer, target);
  const Launch launch(quantizer.x());
  quantizer.prepare();
  return run(quantizer, target.k_multiple, launch);
}

std::tuple<Tensor, Tensor> quantize_op(const Tensor& x, const MaybeTensor& inv_smooth,
                                       const MaybeTensor& scale, StringHandle granularity,
                                       int64_t k_multiple, int64_t rotation) {
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  Quantizer quantizer("quantize", x);
  return run(quantizer, target);
}

std::tuple<Tensor, Tensor, Tensor> run_norm(Quantizer& quantizer, const MaybeTensor& residual,
                                            const Target& target) {
  const Tensor& x = quantizer.x();
  if (residual) quantizer.set_residual(*residual);
  set_target(quantizer, target);
  const Launch launch(x);
  quantizer.prepare();
  Tensor sum = residual ? quantizer.make_sum() : new_vector(x, 0, x.scalar_type());
  auto [x_q, x_scale] = run(quantizer, target.k_multiple, launch);
  return {x_q, x_scale, sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_op(const Tensor& x, const Tensor& weight,
                                                        double eps, const MaybeTensor& residual,
                                                        const MaybeTensor& inv_smooth,
                                                        const MaybeTensor& scale,
                                                        StringHandle granularity,
                                                        int64_t k_multiple, int64_t rotation) {
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  const MaybeTensor given = weight;
  Quantizer quantizer("rms_norm_quantize", x);
  quantizer.set_norm(Producer::kRmsNorm, "weight", given, "bias", std::nullopt, eps);
  return run_norm(quantizer, residual, target);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantize_op(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
    const MaybeTensor& residual, const MaybeTensor& inv_smooth, const MaybeTensor& scale,
    StringHandle granularity, int64_t k_multiple, int64_t rotation) {
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  Quantizer quantizer("layer_norm_quantize", x);
  quantizer.set_norm(Producer::kLayerNorm, "weight", weight, "bias", bias, eps);
  return run_norm(quantizer, residual, target);
}

std::tuple<Tensor, Tensor> act_quantize_op(const Tensor& x, StringHandle kind_handle,
                                           const MaybeTensor& gate, const MaybeTensor& inv_smooth,
                                           const MaybeTensor& scale, StringHandle granularity,
                                           int64_t k_multiple, int64_t rotation) {
  const Text kind(kind_handle);
  const Target target{inv_smooth, scale, Text(granularity), k_multiple, rotation};
  Quantizer quantizer("act_quantize", x);
  quantizer.set_activation(find_kind(quantizer.op(), kind.view()), gate);
  return run(quantizer, target);
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("quantize", TORCH_BOX(&sqk::quantize_op));
  m.impl("rms_norm_quantize", TORCH_BOX(&sqk::rms_norm_quantize_op));
  m.impl("layer_norm_quantize", TORCH_BOX(&sqk::layer_norm_quantize_op));
  m.impl("act_quantize", TORCH_BOX(&sqk::act_quantize_op));
}
