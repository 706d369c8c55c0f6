// 64 products of uint8 and int8 at a time: vpdpbusd. Included by the files of the levels only.

struct Dot {
  using X = uint8_t;
  static constexpr int kX = 128;  // x + 128 is in [0, 255]
  static constexpr int64_t kStep = 64;
  // 24 sums, 6 weights and one row of activations in 32 registers.
  static constexpr int kRows = 4, kColumns = 6;
  using XVector = __m512i;
  using WVector = __m512i;
  using Sum = __m512i;
  static XVector read_x(const X* x) { return _mm512_loadu_si512(x); }
  static WVector read_w(const int8_t* w) { return _mm512_loadu_si512(w); }
  static WVector read_w_some(const int8_t* w, int64_t count) {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, w);
  }
  // As assembly, because the compiler copies sums from register to register around its intrinsic,
  // and has none left then.
  static Sum dot(Sum sum, XVector x, WVector w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
  static Sum ones_dot(Sum sum, WVector w) {
    return dot(sum, _mm512_set1_epi8(static_cast<char>(kX)), w);
  }

  // The sums over the lanes of four vectors.
  static __m128i totals_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
  // Writes up to 3 elements beyond kCount.
  template <int kCount>
  static void totals(const Sum* sums, int32_t* to) {
    if constexpr (kCount == 1) {
      *to = _mm512_reduce_add_epi32(*sums);
    } else {
      const __m512i none = _mm512_setzero_si512();
      for (int n = 0; n < kCount; n += 4) {
        write(to + n,
              totals_of(sums[n], n + 1 < kCount ? sums[n + 1] : none,
                        n + 2 < kCount ? sums[n + 2] : none, n + 3 < kCount ? sums[n + 3] : none));
      }
    }
  }
};
