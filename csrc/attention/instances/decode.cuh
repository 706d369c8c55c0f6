// What the files of the shapes instantiate. Kernel ring: no torch.
#pragma once

#include "attention/decode.cuh"

namespace sqk {

template <int kDim>
DecodeKernel decode_kernel_for(int columns) {
  constexpr int kWide = decode_shape(kDim, 64).columns;
  return columns == 8 ? decode_attention_kernel<kDim, 8> : decode_attention_kernel<kDim, kWide>;
}

}  // namespace sqk
