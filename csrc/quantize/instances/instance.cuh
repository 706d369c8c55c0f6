// All row kernels of one producer, but those with clusters. Kernel ring: no torch.
#pragma once

#include "quantize/kernels.h"

namespace sqk {

template <Producer kProducer>
RowKernel row_kernel_for(DType dtype, QuantizePath path) {
  switch (path) {
    case QuantizePath::kWarp:
      return row_kernel_of_type<kProducer, QuantizePath::kWarp>(dtype);
    case QuantizePath::kBlock:
      return row_kernel_of_type<kProducer, QuantizePath::kBlock>(dtype);
    case QuantizePath::kWide:
      return row_kernel_of_type<kProducer, QuantizePath::kWide>(dtype);
    case QuantizePath::kLong:
      return row_kernel_of_type<kProducer, QuantizePath::kLong>(dtype);
    case QuantizePath::kElement:
      return row_kernel_of_type<kProducer, QuantizePath::kElement>(dtype);
    default:
      return nullptr;
  }
}

}  // namespace sqk
