// All row kernels of one producer, but those with clusters. Kernel ring: no torch.
#pragma once

#include "quantize/kernels.h"

namespace sqk {

template <Producer kProducer>
RowKernel row_kernel_for(DType dtype, QuantizePath path, Launches launches) {
  constexpr Launches kOne = Launches::kOne, kTwo = Launches::kTwo;
  const bool two = launches == kTwo;
  switch (path) {
    case QuantizePath::kWarp:
      return two ? row_kernel_of_type<kProducer, QuantizePath::kWarp, kTwo>(dtype)
                 : row_kernel_of_type<kProducer, QuantizePath::kWarp, kOne>(dtype);
    case QuantizePath::kBlock:
      return two ? nullptr : row_kernel_of_type<kProducer, QuantizePath::kBlock, kOne>(dtype);
    case QuantizePath::kWide:
      return two ? row_kernel_of_type<kProducer, QuantizePath::kWide, kTwo>(dtype)
                 : row_kernel_of_type<kProducer, QuantizePath::kWide, kOne>(dtype);
    case QuantizePath::kLong:
      return two ? row_kernel_of_type<kProducer, QuantizePath::kLong, kTwo>(dtype)
                 : row_kernel_of_type<kProducer, QuantizePath::kLong, kOne>(dtype);
    case QuantizePath::kElement:
      return two ? row_kernel_of_type<kProducer, QuantizePath::kElement, kTwo>(dtype)
                 : row_kernel_of_type<kProducer, QuantizePath::kElement, kOne>(dtype);
    default:
      return nullptr;
  }
}

}  // namespace sqk
