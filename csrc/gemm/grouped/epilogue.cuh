// The epilogue of the GEMMs by experts: that of a GEMM, with the scales of one expert. Kernel ring:
// no torch.
#pragma once

#include "gemm/epilogue/params.cuh"
#include "sqk/grouped.h"

namespace sqk {

// On the host: of the whole y. epilogue_of makes an expert's one.
inline Epilogue make_grouped_epilogue(const GroupedParams& p) {
  GemmParams gemm = {};
  gemm.m = p.m;
  gemm.n = p.n;
  gemm.k = p.k;
  gemm.x_scale = p.x_scale;
  gemm.x_per_token = p.x_per_token;
  gemm.w_scale = p.w_scale;
  gemm.w_per_channel = 1;
  gemm.bias = p.bias;
  gemm.y = p.y;
  gemm.y_stride = p.y_stride;
  gemm.y_dtype = p.y_dtype;
  Epilogue epilogue = make_epilogue(gemm);
  // The scales of every expert must start at an even position to be read in pairs.
  epilogue.plain = epilogue.plain && (p.n % 2 == 0 || p.experts == 1);
  return epilogue;
}

// Rows keep their numbers in y, so only their end and the parameters of the channels differ.
__device__ inline Epilogue epilogue_of(const Epilogue& whole, int32_t expert, uint32_t last) {
  Epilogue own = whole;
  own.m = static_cast<int32_t>(last);
  own.w_scale += int64_t{expert} * whole.n;
  if (own.bias != nullptr) own.bias += int64_t{expert} * whole.n;
  return own;
}

// Writes zeros to kM x kN elements of y, from a row and a channel on, as far as they are before row
// `last` and in y. y is a float, so zeros are zero bytes.
template <int kM, int kN, int kThreads>
__device__ inline void store_zeros(const Epilogue& e, uint32_t row0, uint32_t last,
                                   uint32_t channel0) {
  const int bytes = visit_float(
      e.y_dtype, [](auto type) { return static_cast<int>(sizeof(Element<decltype(type)>)); });
  const int step = 16 / bytes;
  const int pieces = kN / step;
  for (int i = threadIdx.x; i < kM * pieces; i += kThreads) {
    const uint32_t row = row0 + i / pieces;
    const int channel = static_cast<int>(channel0) + i % pieces * step;
    if (row >= last || channel >= e.n) continue;
    auto* const to = static_cast<int8_t*>(e.y) + (row * e.y_stride + channel) * bytes;
    if (e.wide && channel + step <= e.n) {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      continue;
    }
    for (int j = 0; j < step && channel + j < e.n; ++j) {
      if (bytes == 2) {
        reinterpret_cast<uint16_t*>(to)[j] = 0;
      } else {
        reinterpret_cast<uint32_t*>(to)[j] = 0;
      }
    }
  }
}

}  // namespace sqk
