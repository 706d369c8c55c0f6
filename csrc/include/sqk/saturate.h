// float32 -> int8 by rounding half to even and saturating. Public ring: no torch, no CUTLASS,
// compiles with a plain C++ compiler.
//
// The smallest kernel there is: it carries the build, the binding and the simulator's tests, and it
// is the model for a new one.
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

// The same for callers without C++: a Status as a number, the stream as an address (null: the
// default stream).
extern "C" SQK_EXPORT int32_t sqk_saturate_s8(const float* x, int8_t* y, int64_t numel,
                                              void* stream);
