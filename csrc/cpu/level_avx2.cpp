// AVX2 without 8-bit dot products: Haswell to Zen 3. CPU ring: no torch, no CUDA.
//
// Products of 16-bit integers (vpmaddwd) are exact for all int8. vpmaddubsw would multiply 8 bits,
// but it saturates, and the ways around that (twice the rows, or signs moved from one operand to
// the other) take as many instructions.
#define SQK_LEVEL kKernelsAvx2
#include "cpu/level.h"

namespace sqk {
namespace {

#include "cpu/nibbles256.h"
#include "cpu/totals256.h"

struct Dot {
  using X = int16_t;  // converted once, when the rows are packed
  static constexpr int kX = 0;
  static constexpr int64_t kStep = 16;
  static constexpr int kRows = 4, kColumns = 2;
  using XVector = __m256i;
  using WVector = __m256i;
  using Sum = __m256i;
  static XVector read_x(const X* x) { return read<__m256i>(x); }
  static WVector read_w(const int8_t* w) { return _mm256_cvtepi8_epi16(read<__m128i>(w)); }
  static WVector read_w_some(const int8_t* w, int64_t count) {
    return _mm256_cvtepi8_epi16(
        bits_as<__m128i>(read_some<VectorOf<int8_t, kStep>::Type>(w, count)));
  }
  static Sum dot(Sum sum, XVector x, WVector w) {
    // As assembly for the same reason as in dot512.h.
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(x, w)));
    return sum;
  }
  static Sum ones_dot(Sum sum, WVector) { return sum; }
  template <int kCount>
  static void totals(const Sum* sums, int32_t* to) {
    totals256<kCount>(sums, to);
  }
};

struct Nibbles {
  static constexpr int64_t kMostRowsInPlace = kMostRows;
  static constexpr int kRows = 4;
  static constexpr bool kStepTwice = true;
  using Values = Nibbles256;
  using Step = __m256i;
  static Values read(const uint8_t* w) { return read_nibbles256(w); }
  static Step read_step(const int32_t* step) { return _mm256_set1_epi32(*step); }
  // vpmaddubsw never saturates here: the sum of two products is at most 2 * 15 * 128.
  static Dot::Sum add(Dot::Sum sum, const int8_t* x, const Values& values, Step step) {
    __m256i products = _mm256_maddubs_epi16(values.of[0], read_x(x, 0));
    for (int i = 1; i < 4; ++i) {
      products = _mm256_add_epi16(products, _mm256_maddubs_epi16(values.of[i], read_x(x, i)));
    }
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(products, step)));
    return sum;
  }
  static __m256i read_x(const int8_t* x, int i) { return ::sqk::read<__m256i>(x + 32 * i); }
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
