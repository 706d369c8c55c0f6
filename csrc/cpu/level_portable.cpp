// The kernels in plain C++, for every processor. CPU ring: no torch, no CUDA.
#define SQK_LEVEL kKernelsPortable
#include "cpu/level.h"

namespace sqk {
namespace {

struct Dot {
  using X = int8_t;
  static constexpr int kX = 0;
  static constexpr int64_t kStep = 16;
  static constexpr int kRows = 2, kColumns = 2;
  using XVector = VectorOf<int8_t, kStep>::Type;
  using WVector = XVector;
  using Sum = VectorOf<int32_t, kStep>::Type;
  static XVector read_x(const X* x) { return read<XVector>(x); }
  static WVector read_w(const int8_t* w) { return read<WVector>(w); }
  static WVector read_w_some(const int8_t* w, int64_t count) {
    return read_some<WVector>(w, count);
  }
  static Sum dot(Sum sum, XVector x, WVector w) {
    return sum + __builtin_convertvector(x, Sum) * __builtin_convertvector(w, Sum);
  }
  static Sum ones_dot(Sum sum, WVector) { return sum; }
  template <int kCount>
  static void totals(const Sum* sums, int32_t* to) {
    for (int n = 0; n < kCount; ++n) {
      to[n] = 0;
      for (int lane = 0; lane < kStep; ++lane) to[n] += sums[n][lane];
    }
  }
};

// Each needs those before it.
// clang-format off
#include "cpu/panels.h"
#include "cpu/scores.h"
#include "cpu/attend.h"
// clang-format on

}  // namespace

SQK_LEVEL_BY_ROWS
}  // namespace sqk
