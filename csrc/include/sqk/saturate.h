// float32 -> int8 by rounding half to even and saturating. Public ring: no torch, no CUTLASS,
// compiles with a plain C++ compiler.
//
// The smallest kernel: a model for new ones, and the subject of the tests of the build, the binding
// and the simulator.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

struct SaturateParams {
  const float* x;  // [numel], contiguous, aligned to 4 bytes
  int8_t* y;       // [numel], contiguous
  int64_t numel;   // 0 is allowed: nothing is launched
};

// y = clamp(rint(x), -128, 127); NaN gives 0, infinities saturate.
Status saturate_s8(const SaturateParams& params, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++. Returns a Status; a null stream is the default stream.
extern "C" SQK_EXPORT int32_t sqk_saturate_s8(const float* x, int8_t* y, int64_t numel,
                                              void* stream);
