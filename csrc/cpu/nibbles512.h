// The 4-bit values of a group in vectors of 512 bits. Included by the files of the levels only,
// after dot512.h.

struct Nibbles {
  // Beyond that, what unpacking costs is less than a step for each row and group.
  static constexpr int64_t kMostRowsInPlace = 8;
  static constexpr int kRows = 4;
  static constexpr bool kStepTwice = false;
  struct Values {
    __m512i low, high;
  };
  using Step = __m512i;
  static Values read(const uint8_t* w) {
    const __m512i mask = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
    return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
  }
  static Step read_step(const int32_t* step) { return _mm512_set1_epi32(*step); }
  // Sums of products fit 16 bits, so that the step is a factor of 16 bits as well, with 0 for the
  // upper halves: vpdpwssd multiplies and adds.
  static Dot::Sum add(Dot::Sum sum, const int8_t* x, const Values& values, Step step) {
    __m512i products = _mm512_setzero_si512();
    products = Dot::dot(products, values.low, _mm512_loadu_si512(x));
    products = Dot::dot(products, values.high, _mm512_loadu_si512(x + 64));
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(products), "v"(step));
    return sum;
  }

  // value * step + offset for the first or the second 64 channels of a group, whose step and offset
  // are at `group`. A product fits its byte, and so one of 16 bits is two products.
  static __m512i weights(const Values& values, const int8_t* group, int half) {
    // Words 4 t + i of the low and of the high halves are 8 i + t and 8 i + 4 + t of the channels.
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28,  //
                                            1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i order = _mm512_add_epi32(first, _mm512_set1_epi32(2 * half));
    const __m512i channels = _mm512_permutex2var_epi32(values.low, order, values.high);
    return _mm512_add_epi8(_mm512_mullo_epi16(channels, _mm512_set1_epi16(group[0])),
                           _mm512_set1_epi8(group[1]));
  }
  static void unpack(const uint8_t* w, const int8_t* group, int8_t* to) {
    const Values values = read(w);
    for (int half = 0; half < 2; ++half) {
      _mm512_storeu_si512(to + 64 * half, weights(values, group, half));
    }
  }
};
