// Binding of csrc/quantize/saturate.cu. The schema, fake and CPU kernels are in
// smoothquant_kernels/ops/ and backends/.
#include "sqk/saturate.h"

#include "check.h"
#include "stable.h"

namespace sqk {
namespace {

Tensor saturate_s8_op(const Tensor& x) {
  SQK_CHECK_DTYPE("_saturate_s8", x, ScalarType::Float);
  const Launch launch(x);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor y = empty_on(x, x.sizes().data(), x.sizes().size(), ScalarType::Char);
  const SaturateParams params{dense.const_data_ptr<float>(), y.mutable_data_ptr<int8_t>(),
                              x.numel()};
  SQK_CHECK_STATUS("_saturate_s8", saturate_s8(params, launch.stream()), "x ", shape_text(x));
  return y;
}

}  // namespace
}  // namespace sqk

STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, SQK_DISPATCH_KEY, m) {
  m.impl("_saturate_s8", TORCH_BOX(&sqk::saturate_s8_op));
}
