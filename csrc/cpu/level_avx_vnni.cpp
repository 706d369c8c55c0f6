// AVX2 with 8-bit dot products (AVX-VNNI): Alder Lake and newer, Zen 5. CPU ring: no torch, no
// CUDA.
#define SQK_LEVEL kKernelsAvxVnni
#include "cpu/level.h"

namespace sqk {
namespace {

#include "cpu/nibbles256.h"
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

struct Nibbles {
  // Beyond that, what unpacking costs is less than a step for each row and group.
  static constexpr int64_t kMostRowsInPlace = 8;
  static constexpr int kRows = 4;
  static constexpr bool kStepTwice = false;
  using Values = Nibbles256;
  using Step = __m256i;
  static Values read(const uint8_t* w) { return read_nibbles256(w); }
  static Step read_step(const int32_t* step) { return _mm256_set1_epi32(*step); }
  // Sums of products fit 16 bits, so that the step is a factor of 16 bits as well, with 0 for the
  // upper halves: vpdpwssd multiplies and adds.
  static Dot::Sum add(Dot::Sum sum, const int8_t* x, const Values& values, Step step) {
    __m256i products = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      __asm__("%{vex%} vpdpbusd %2, %1, %0"
              : "+x"(products)
              : "x"(values.of[i]), "x"(::sqk::read<__m256i>(x + 32 * i)));
    }
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(products), "x"(step));
    return sum;
  }
  static void unpack(const uint8_t* w, const int8_t* group, int8_t* to) {
    unpack_nibbles256(w, group, to);
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
