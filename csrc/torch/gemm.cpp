// Binding of csrc/gemm: the int8 GEMMs. Schemas, fakes and CPU kernels are in
// smoothquant_kernels/ops/.
#include "sqk/gemm.h"

#include "gemm_call.h"

namespace sqk {
namespace {

Tensor gemm(const char* op, const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
            const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
            ScalarType out_dtype, int64_t tile, int64_t splits,
            const MaybeTensor& w_group = std::nullopt) {
  check_int8(op, "x_q", x_q);
  Gemm gemm(op, x_q, channels(x_q), w_q, w_scale, bias, residual, out_dtype, w_group);
  check_activation(op, x_q, x_scale);
  SQK_CHECK(is_float(out_dtype), op, ": out_dtype must be float16, bfloat16 or float32, got ",
            dtype_name(out_dtype), ".");
  constexpr int64_t kMostInt = 1 << 30;
  SQK_CHECK(tile >= -1 && tile < kMostInt && splits >= 0 && splits < kMostInt, op,
            ": tile must be -1 or a row of the table, splits at least 0, got ", tile, " and ",
            splits, ".");
  const Launch launch(x_q);
  gemm.prepare();
  gemm.set_activation(x_q, x_scale);
  gemm.params().tile = static_cast<int32_t>(tile);
  gemm.params().splits = static_cast<int32_t>(splits);
  return gemm.run(launch);
}

Tensor gemm_w4a8_op(const Tensor& x_q, const Tensor& w_q4, const Tensor& w_group,
                    const Tensor& x_scale, const Tensor& w_scale, const MaybeTensor& bias,
                    const MaybeTensor& residual, ScalarType out_dtype) {
  return gemm("gemm_w4a8", x_q, w_q4, x_scale, w_scale, bias, residual, out_dtype, -1, 0, w_group);
}

Tensor gemm_s8_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                  const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                  ScalarType out_dtype) {
  return gemm("gemm_s8", x_q, w_q, x_scale, w_scale, bias, residual, out_dtype, -1, 0);
}

#ifndef SQK_CPU  // a CPU has no tiles to choose from
Tensor gemm_s8_tile_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                       const Tensor& w_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                       ScalarType out_dtype, int64_t tile, int64_t splits) {
  return gemm("_gemm_s8_tile", x_q, w_q, x_scale, w_scale, bias, residual, out_dtype, tile, splits);
}
#endif

Tensor gemm_s8_requant_op(const Tensor& x_q, const Tensor& w_q, const Tensor& x_scale,
                          const Tensor& w_scale, const Tensor& out_scale, const MaybeTensor& bias,
                          bool relu) {
  const char* const op = "gemm_s8_requant";
  check_int8(op, "x_q", x_q);
  Gemm gemm(op, x_q, channels(x_q), w_q, w_scale, bias, std::nullopt, ScalarType::Char);
  check_activation(op, x_q, x_scale);
  check_vector(op, "out_scale", out_scale, x_q, 1, "the scale of the int8 output");
  const Launch launch(x_q);
  gemm.prepare();
  gemm.set_activation(x_q, x_scale);
  gemm.params().out_scale = floats(out_scale);
  gemm.params().relu = relu;
  return gemm.run(launch);
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("gemm_s8", TORCH_BOX(&sqk::gemm_s8_op));
  m.impl("gemm_w4a8", TORCH_BOX(&sqk::gemm_w4a8_op));
  m.impl("gemm_s8_requant", TORCH_BOX(&sqk::gemm_s8_requant_op));
#ifndef SQK_CPU
  m.impl("_gemm_s8_tile", TORCH_BOX(&sqk::gemm_s8_tile_op));
#endif
}
