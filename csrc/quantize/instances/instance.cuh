// All row kernels of one producer, but those with clusters. Kernel ring: no torch.
#pragma once

#include "quantize/kernels.h"

namespace sqk {

template <Producer kProducer, QuantizePath kPath>
RowKernel row_kernel_of_path(DType dtype, Launches launches, bool rotates) {
  if (launches == Launches::kOne) {
    return row_kernel_of_type<kProducer, kPath, Launches::kOne>(dtype, rotates);
  }
  if constexpr (serves_two_launches(kPath)) {
    return row_kernel_of_type<kProducer, kPath, Launches::kTwo>(dtype, rotates);
  } else {
    return nullptr;
  }
}

template <Producer kProducer>
RowKernel row_kernel_for(DType dtype, QuantizePath path, Launches launches, bool rotates) {
  switch (path) {
    case QuantizePath::kWarp:
      return row_kernel_of_path<kProducer, QuantizePath::kWarp>(dtype, launches, rotates);
    case QuantizePath::kBlock:
      return row_kernel_of_path<kProducer, QuantizePath::kBlock>(dtype, launches, rotates);
    case QuantizePath::kWide:
      return row_kernel_of_path<kProducer, QuantizePath::kWide>(dtype, launches, rotates);
    case QuantizePath::kLong:
      return row_kernel_of_path<kProducer, QuantizePath::kLong>(dtype, launches, rotates);
    case QuantizePath::kElement:
      return row_kernel_of_path<kProducer, QuantizePath::kElement>(dtype, launches, rotates);
    case QuantizePath::kAuto:
    case QuantizePath::kCluster:
      break;
  }
  return nullptr;
}

}  // namespace sqk
