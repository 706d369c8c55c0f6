// Where the compiled row kernels are found. Kernel ring: no torch.
#pragma once

#include "quantize/row_kernel.cuh"

namespace sqk {

using RowKernel = void (*)(RowParams);

// Defined by instances/<producer>.cu: all paths but kCluster; nullptr where there is none.
template <Producer kProducer>
RowKernel row_kernel_for(DType dtype, QuantizePath path, Launches launches);

// Defined by instances/cluster_sm90.cu, if that was built.
RowKernel cluster_kernel_for(Producer producer, DType dtype);

template <Producer kProducer, QuantizePath kPath, Launches kLaunches>
RowKernel row_kernel_of_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return row_kernel<float, kProducer, kPath, kLaunches>;
    case DType::kFloat16:
      return row_kernel<__half, kProducer, kPath, kLaunches>;
    case DType::kBFloat16:
      return row_kernel<__nv_bfloat16, kProducer, kPath, kLaunches>;
    default:
      return nullptr;
  }
}

}  // namespace sqk
