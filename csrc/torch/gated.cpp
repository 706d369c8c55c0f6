// Binding of the gated GEMM. The schema, fake and CPU kernel are in smoothquant_kernels/ops/.
#include <tuple>

#include "gemm_call.h"
#include "quantize_call.h"

namespace sqk {
namespace {

// The two ops, for problems that no tile computes at once, or only more slowly.
#ifndef SQK_CPU
void run_apart(const char* op, const Launch& launch, Gemm& gemm, Tensor& y_q) {
  const GemmParams gated = gemm.params();
  GemmParams& product = gemm.params();
  product.activation = Producer::kQuantize;
  product.y_dtype = gated.gate_dtype;
  product.out_scale = nullptr;
  const Tensor y = gemm.run(launch);
  QuantizeParams params = {};
  params.producer = gated.activation;
  params.scheme = Scheme::kStatic;
  params.dtype = gated.gate_dtype;
  params.path = QuantizePath::kAuto;
  params.m = gated.m;
  params.k = params.k_padded = params.x_q_stride = gated.n / 2;
  params.x = params.gate = y.const_data_ptr();
  params.x_stride = params.gate_stride = gated.n;
  params.interleaved = 1;
  params.inv_smooth = gated.inv_smooth;
  params.scale = gated.out_scale;
  params.x_q = static_cast<int8_t*>(y_q.mutable_data_ptr());
  params.x_scale = gated.y_scale;
  const Status status = run_quantizer(params, y, launch);
  SQK_CHECK(status == Status::kSuccess, op, ": ", describe(status), "; M ", gated.m, ", N ",
            gated.n);
}
#endif

std::tuple<Tensor, Tensor> gemm_s8_gated_op(const Tensor& x_q, const Tensor& w_q,
                                            const Tensor& x_scale, const Tensor& w_scale,
                                            const Tensor& out_scale, StringHandle kind_handle,
                                            const MaybeTensor& bias, const MaybeTensor& inv_smooth,
                                            ScalarType dtype) {
  const char* const op = "gemm_s8_gated";
  const Text kind(kind_handle);
  check_int8(op, "x_q", x_q);
  Gemm gemm(op, x_q, channels(x_q), w_q, w_scale, bias, std::nullopt, ScalarType::Char);
  check_activation(op, x_q, x_scale);
  GemmParams& params = gemm.params();
  params.activation = find_kind(op, kind.view(), "", true).producer;
  SQK_CHECK(params.n % 2 == 0, op,
            ": w_q must have an even number of rows, those of gate and up "
            "(reference.interleave_gate_up), got ",
            params.n, ".");
  check_vector(op, "out_scale", out_scale, x_q, 1, "the scale of the int8 output");
  check_vector(op, "inv_smooth", inv_smooth, x_q, params.n / 2, "one factor per output channel");
  SQK_CHECK(is_float(dtype), op, ": dtype must be float16, bfloat16 or float32, got ",
            dtype_name(dtype), ".");
  const Launch launch(x_q);
  gemm.prepare();
  gemm.set_activation(x_q, x_scale);
  const MaybeTensor factors = dense(inv_smooth);
  if (factors) params.inv_smooth = floats(*factors);
  params.out_scale = floats(out_scale);
  params.gate_dtype = to_dtype(dtype);
  Tensor y_scale = new_vector(x_q, params.m, ScalarType::Float);
  params.y_scale = static_cast<float*>(y_scale.mutable_data_ptr());
  Tensor y_q = gemm.make_y();
  Status status = gemm.run_to_y(launch);
#ifndef SQK_CPU
  if (status == Status::kUnsupportedShape || status == Status::kExcludedTile) {
    run_apart(op, launch, gemm, y_q);
    status = Status::kSuccess;
  }
#endif
  gemm.check(status);
  return {y_q, y_scale};
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("gemm_s8_gated", TORCH_BOX(&sqk::gemm_s8_gated_op));
}
