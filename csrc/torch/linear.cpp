// Binding of the whole linear layer: quantizer and GEMM in one op. The schema, fake and CPU kernel
// are in smoothquant_kernels/ops/.
#include "sqk/linear.h"

#include "gemm_call.h"

namespace sqk {
namespace {

Tensor linear_s8_op(const Tensor& x, const Tensor& w_q, const Tensor& w_scale,
                    const MaybeTensor& bias, const MaybeTensor& inv_smooth,
                    const MaybeTensor& scale, StringHandle granularity_handle, int64_t rotation) {
  const char* const op = "linear_s8";
  const Text granularity(granularity_handle);
  check_activation_input(op, x);
  Gemm gemm(op, x, w_q, w_scale, bias, x.scalar_type());
  LinearParams params = {};
  QuantizeParams& quantizer = params.quantize;
  quantizer.producer = Producer::kQuantize;
  check_quantizer(op, x, gemm.params().k, inv_smooth, scale, granularity.view(), rotation,
                  quantizer);
  const Launch launch(x);
  gemm.prepare();
  const Rows rows(x);
  quantizer.x = rows.data;
  quantizer.x_stride = rows.stride;
  const MaybeTensor factors = dense(inv_smooth);
  if (factors) quantizer.inv_smooth = floats(*factors);
  if (scale) quantizer.scale = floats(*scale);
  quantizer.k_padded = padded(quantizer.k);
  quantizer.x_q_stride = quantizer.k_padded;
  Tensor y = gemm.make_y();
  params.gemm = gemm.params();
  params.gemm.x_q_stride = quantizer.k_padded;
  LinearPlan plan;
  Status status = sqk::plan(params, &plan);
  if (status == Status::kSuccess) {
    // One allocation holds x_q, x_scale and the workspace, which only this call needs.
    int64_t x_q_bytes = 0, x_scale_bytes = 0;
    if (!plan.fused) {
      const int64_t scales = quantizer.scheme == Scheme::kPerTensor ? 1 : quantizer.m;
      x_q_bytes = round_up(quantizer.m * quantizer.k_padded, kBufferAlignment);
      x_scale_bytes = round_up(scales * int64_t{sizeof(float)}, kBufferAlignment);
    }
    MaybeTensor keep;
    auto* const memory = static_cast<int8_t*>(
        make_workspace(x, x_q_bytes + x_scale_bytes + plan.workspace_bytes, keep));
    if (!plan.fused) {
      quantizer.x_q = memory;
      quantizer.x_scale = reinterpret_cast<float*>(memory + x_q_bytes);
    }
    params.gemm.workspace_bytes = plan.workspace_bytes;
    if (plan.workspace_bytes > 0) params.gemm.workspace = memory + x_q_bytes + x_scale_bytes;
    status = linear_s8(params, plan, launch.stream());
  }
  gemm.check(status);
  return y;
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("linear_s8", TORCH_BOX(&sqk::linear_s8_op));
}
