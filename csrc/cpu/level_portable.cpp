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
      uint32_t total = 0;  // wraps around
      for (int lane = 0; lane < kStep; ++lane) total += static_cast<uint32_t>(sums[n][lane]);
      to[n] = static_cast<int32_t>(total);
    }
  }
};

struct Nibbles {
  static constexpr int64_t kMostRowsInPlace = kMostRows;
  static constexpr int kRows = 2;
  static constexpr bool kStepTwice = false;
  static constexpr int kParts = kW4Bytes / Dot::kStep;
  using Bytes16 = VectorOf<uint8_t, Dot::kStep>::Type;
  using Products = VectorOf<int16_t, Dot::kStep>::Type;
  struct Values {
    Bytes16 of[2 * kParts];
  };
  using Step = int32_t;
  static Values read(const uint8_t* w) {
    Values values;
    for (int i = 0; i < kParts; ++i) {
      const auto both = ::sqk::read<Bytes16>(w + i * Dot::kStep);
      values.of[i] = both & 15;
      values.of[kParts + i] = both >> 4;
    }
    return values;
  }
  static Step read_step(const int32_t* step) { return *step; }
  static Dot::Sum add(Dot::Sum sum, const int8_t* x, const Values& values, Step step) {
    Products products = {};
    for (int i = 0; i < 2 * kParts; ++i) {
      products += __builtin_convertvector(Dot::read_x(x + i * Dot::kStep), Products) *
                  __builtin_convertvector(values.of[i], Products);
    }
    return sum + __builtin_convertvector(products, Dot::Sum) * step;
  }
};

// Each needs those before it.
// clang-format off
#include "cpu/panels.h"
#include "cpu/w4.h"
#include "cpu/scores.h"
#include "cpu/attend.h"
// clang-format on

}  // namespace

SQK_LEVEL_BY_ROWS
}  // namespace sqk
