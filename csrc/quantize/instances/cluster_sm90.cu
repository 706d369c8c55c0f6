// The row kernels with thread block clusters, of every producer. Kernel ring: no torch.
#include "quantize/kernels.h"

namespace sqk {

RowKernel cluster_kernel_for(Producer producer, DType dtype) {
  constexpr QuantizePath kPath = QuantizePath::kCluster;
  switch (producer) {
    case Producer::kQuantize:
      return row_kernel_of_type<Producer::kQuantize, kPath, Launches::kOne>(dtype);
    case Producer::kRmsNorm:
      return row_kernel_of_type<Producer::kRmsNorm, kPath, Launches::kOne>(dtype);
    case Producer::kLayerNorm:
      return row_kernel_of_type<Producer::kLayerNorm, kPath, Launches::kOne>(dtype);
    case Producer::kRelu:
      return row_kernel_of_type<Producer::kRelu, kPath, Launches::kOne>(dtype);
    case Producer::kGelu:
      return row_kernel_of_type<Producer::kGelu, kPath, Launches::kOne>(dtype);
    case Producer::kGeluTanh:
      return row_kernel_of_type<Producer::kGeluTanh, kPath, Launches::kOne>(dtype);
    case Producer::kSilu:
      return row_kernel_of_type<Producer::kSilu, kPath, Launches::kOne>(dtype);
  }
  return nullptr;
}

}  // namespace sqk
