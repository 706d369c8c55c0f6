// Binding of the whole linear layer: a producer of int8 and the GEMM in one op. The schemas, fakes
// and CPU kernels in Python are in smoothquant_kernels/.
#include "sqk/linear.h"

#include "gemm_call.h"
#include "quantize_call.h"

namespace sqk {
namespace {

// Allocates y and the workspace, and launches. Everything has been checked.
Tensor run(Quantizer& quantizer, Gemm& gemm) {
  const Launch launch(quantizer.x());
  gemm.prepare();
  quantizer.prepare();
  LinearParams params = {quantizer.params(), {}};
  QuantizeParams& q = params.quantize;
  q.k_padded = padded(q.k);
  q.x_q_stride = q.k_padded;
  Tensor y = gemm.make_y();
  params.gemm = gemm.params();
  params.gemm.x_q_stride = q.k_padded;
  LinearPlan plan;
  Status status = sqk::plan(params, &plan);
  if (status == Status::kSuccess) {
    // One allocation holds x_q, x_scale and the workspace, which only this call needs.
    int64_t x_q_bytes = 0, x_scale_bytes = 0;
    if (!plan.fused) {
      x_q_bytes = round_up(q.m * q.k_padded, kBufferAlignment);
      x_scale_bytes = round_up(quantizer.scales() * int64_t{sizeof(float)}, kBufferAlignment);
    }
    MaybeTensor keep;
    auto* const memory = static_cast<int8_t*>(
        make_workspace(y, x_q_bytes + x_scale_bytes + plan.workspace_bytes, keep));
    if (!plan.fused) {
      q.x_q = memory;
      q.x_scale = reinterpret_cast<float*>(memory + x_q_bytes);
    }
    params.gemm.workspace_bytes = plan.workspace_bytes;
    if (plan.workspace_bytes > 0) params.gemm.workspace = memory + x_q_bytes + x_scale_bytes;
    status = linear_s8(params, plan, launch.stream());
  }
  gemm.check(status);
  return y;
}

Tensor linear_s8_op(const Tensor& x, const Tensor& w_q, const Tensor& w_scale,
                    const MaybeTensor& bias, const MaybeTensor& residual,
                    const MaybeTensor& inv_smooth, const MaybeTensor& scale,
                    StringHandle granularity_handle, int64_t rotation) {
  const char* const op = "linear_s8";
  const Text granularity(granularity_handle);
  Quantizer quantizer(op, x);
  Gemm gemm(op, x, quantizer.params().k, w_q, w_scale, bias, residual, x.scalar_type());
  quantizer.set_scheme(inv_smooth, scale, granularity.view(), rotation);
  return run(quantizer, gemm);
}

Tensor linear_w4a8_op(const Tensor& x, const Tensor& w_q4, const Tensor& w_group,
                      const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                      const MaybeTensor& inv_smooth, const MaybeTensor& scale,
                      StringHandle granularity_handle, int64_t rotation) {
  const char* const op = "linear_w4a8";
  const Text granularity(granularity_handle);
  Quantizer quantizer(op, x);
  Gemm gemm(op, x, quantizer.params().k, w_q4, w_scale, bias, residual, x.scalar_type(), w_group);
  quantizer.set_scheme(inv_smooth, scale, granularity.view(), rotation);
  return run(quantizer, gemm);
}

// The arguments of fused_linear_s8 that only some kinds take.
struct Options {
  const MaybeTensor& norm_weight;
  const MaybeTensor& norm_bias;
  double eps;
  const MaybeTensor& gate;
};

void set_producer(Quantizer& quantizer, std::string_view kind, const Options& given) {
  const auto refuse = [&](bool is_given, const char* name) {
    SQK_CHECK(!is_given, quantizer.op(), ": kind '", kind, "' takes no `", name, "`; drop it.");
  };
  const bool rms = kind == "rms_norm", layer = kind == "layer_norm";
  if (rms || layer) {
    refuse(given.gate.has_value(), "gate");
    refuse(rms && given.norm_bias, "norm_bias");
    SQK_CHECK(!rms || given.norm_weight, quantizer.op(), ": kind '", kind,
              "' needs `norm_weight` [K].");
    quantizer.set_norm(rms ? Producer::kRmsNorm : Producer::kLayerNorm, "norm_weight",
                       given.norm_weight, "norm_bias", given.norm_bias, given.eps);
    return;
  }
  const Kind& found = find_kind(quantizer.op(), kind, "rms_norm, layer_norm");
  refuse(given.norm_weight.has_value(), "norm_weight");
  refuse(given.norm_bias.has_value(), "norm_bias");
  refuse(given.eps != 0.0, "eps");
  quantizer.set_activation(found, given.gate);
}

Tensor fused_linear_s8_op(const Tensor& x, StringHandle kind_handle, const Tensor& w_q,
                          const Tensor& w_scale, const MaybeTensor& norm_weight,
                          const MaybeTensor& norm_bias, double eps, const MaybeTensor& gate,
                          const MaybeTensor& bias, const MaybeTensor& residual,
                          const MaybeTensor& inv_smooth, const MaybeTensor& scale,
                          StringHandle granularity_handle, int64_t rotation) {
  const char* const op = "fused_linear_s8";
  const Text kind(kind_handle), granularity(granularity_handle);
  Quantizer quantizer(op, x);
  set_producer(quantizer, kind.view(), {norm_weight, norm_bias, eps, gate});
  Gemm gemm(op, x, quantizer.params().k, w_q, w_scale, bias, residual, x.scalar_type());
  quantizer.set_scheme(inv_smooth, scale, granularity.view(), rotation);
  return run(quantizer, gemm);
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("linear_s8", TORCH_BOX(&sqk::linear_s8_op));
  m.impl("linear_w4a8", TORCH_BOX(&sqk::linear_w4a8_op));
  m.impl("fused_linear_s8", TORCH_BOX(&sqk::fused_linear_s8_op));
}
