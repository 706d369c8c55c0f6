// AVX2 with 8-bit dot products (AVX-VNNI): Alder Lake and newer, Zen 5. CPU ring: no torch, no
// CUDA.
#define SQK_LEVEL kKernelsAvxVnni
#include "cpu/level.h"

namespace sqk {
namespace {

#include "cpu/totals256.h"

struct Dot {
  using X = uint8_t;
  static constexpr int kX = 128;  // x + 128 is in [0, 255]
  static constexpr int64_t kStep = 32;
  static constexpr int kRows = 2, kColumns = 4;
  using XVector = __m256i;
  using WVector = __m256i;
  using Sum = __m256i;
  static XVector read_x(const X* x) { return read<__m256i>(x); }
  static WVector read_w(const int8_t* w) { return read<__m256i>(w); }
  static WVector read_w_some(const int8_t* w, int64_t count) {
    return bits_as<__m256i>(read_some<VectorOf<int8_t, kStep>::Type>(w, count));
  }
  // As assembly for the same reason as in dot512.h.
  static Sum dot(Sum sum, XVector x, WVector w) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
    return sum;
  }
  static Sum ones_dot(Sum sum, WVector w) {
    return dot(sum, _mm256_set1_epi8(static_cast<char>(kX)), w);
  }
  template <int kCount>
  static void totals(const Sum* sums, int32_t* to) {
    totals256<kCount>(sums, to);
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
