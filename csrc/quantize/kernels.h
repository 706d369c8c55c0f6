// Where the compiled row kernels are found. Kernel ring: no torch.
#pragma once

#include "quantize/row_kernel.cuh"

namespace sqk {

using RowKernel = void (*)(RowParams);

// Defined by instances/<producer>.cu, for all paths except kCluster; nullptr if there is no such
// kernel.
template <Producer kProducer>
RowKernel row_kernel_for(DType dtype, QuantizePath path, Launches launches, bool rotates);

// Defined by instances/cluster_sm90.cu, if the build has 9.0a.
RowKernel cluster_kernel_for(Producer producer, DType dtype);

template <Producer kProducer, QuantizePath kPath, Launches kLaunches>
RowKernel row_kernel_of_type(DType dtype, bool rotates) {
  return visit(dtype, [&](auto type) -> RowKernel {
    if constexpr (is_float(decltype(type)::value)) {
      using T = Element<decltype(type)>;
      if constexpr (is_compiled_for_rotations(kPath)) {
        // Rarely needed: one kernel for one launch and for two.
        return rotates ? row_kernel<T, kProducer, kPath, Launches::kTwo, true>
                       : row_kernel<T, kProducer, kPath, kLaunches, false>;
      } else {
        return row_kernel<T, kProducer, kPath, kLaunches, true>;
      }
    } else {
      return nullptr;
    }
  });
}

}  // namespace sqk
