// The 4-bit values of a group in vectors of 256 bits. Included by the files of the levels only.

struct Nibbles256 {
  __m256i of[4];
};

inline Nibbles256 read_nibbles256(const uint8_t* w) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i first = read<__m256i>(w), second = read<__m256i>(w + 32);
  return {{_mm256_and_si256(first, mask), _mm256_and_si256(second, mask),
           _mm256_and_si256(_mm256_srli_epi16(first, 4), mask),
           _mm256_and_si256(_mm256_srli_epi16(second, 4), mask)}};
}

// Writes value * step + offset of a group in the order of the channels. The low and the high halves
// of 16 bytes are the two halves of a vector, so that the transposition of 4 x 4 words gives 32
// adjacent channels. A product fits its byte, and so one of 16 bits is two products.
inline void unpack_nibbles256(const uint8_t* w, const int8_t* group, int8_t* to) {
  const __m256i mask = _mm256_set1_epi8(15), shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
  const __m256i step = _mm256_set1_epi16(group[0]), offset = _mm256_set1_epi8(group[1]);
  const auto halves = [&](int t) {
    const __m256i both = _mm256_broadcastsi128_si256(read<__m128i>(w + 16 * t));
    return _mm256_and_si256(_mm256_srlv_epi32(both, shifts), mask);
  };
  const __m256i a = halves(0), b = halves(1), c = halves(2), d = halves(3);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_end = _mm256_unpackhi_epi32(a, b), cd_end = _mm256_unpackhi_epi32(c, d);
  const auto put = [&](int i, __m256i values) {
    write(to + 32 * i, _mm256_add_epi8(_mm256_mullo_epi16(values, step), offset));
  };
  put(0, _mm256_unpacklo_epi64(ab, cd));
  put(1, _mm256_unpackhi_epi64(ab, cd));
  put(2, _mm256_unpacklo_epi64(ab_end, cd_end));
  put(3, _mm256_unpackhi_epi64(ab_end, cd_end));
}
