// Rows of activations packed side by side: for each 4 channels those of 16 rows. Included by the
// files of the levels only, in an anonymous namespace, after panels.h.

constexpr int64_t kFour = 4;         // channels of an 8-bit dot product
constexpr int64_t kPackedStep = 64;  // channels that are transposed together

// rows[i][j] = column(j)[i] for 16 x 16 int32. A function, and not an array, because the compiler
// would write the array to memory first.
template <typename F>
inline void transpose(const F& column, __m512i (&rows)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512i first = column(i), second = column(i + 1);
    a[i] = _mm512_unpacklo_epi32(first, second);
    a[i + 1] = _mm512_unpackhi_epi32(first, second);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
  }
}

// Packs up to 16 rows, each x + kShift; the other rows are 0.
template <int kShift>
inline void pack_interleaved(const int8_t* x_q, int64_t stride, int64_t rows, int64_t k,
                             uint8_t* packed) {
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(kShift));
  for (int64_t at = 0; at < packed_row(k); at += kPackedStep) {
    __m512i channels[16];
    const auto token = [&](int64_t row) {
      const __m512i x =
          row < rows ? _mm512_loadu_si512(x_q + row * stride + at) : _mm512_setzero_si512();
      return _mm512_add_epi8(x, shift);
    };
    transpose(token, channels);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + at * kGroup + 64 * i, channels[i]);
  }
}
