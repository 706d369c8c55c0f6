// The sums over the lanes of vectors of 256 bits. Included by the files of the levels only.

inline __m128i totals_of(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// Writes up to 3 elements beyond kCount.
template <int kCount>
inline void totals256(const __m256i* sums, int32_t* to) {
  const __m256i none = _mm256_setzero_si256();
  for (int n = 0; n < kCount; n += 4) {
    write(to + n,
          totals_of(sums[n], n + 1 < kCount ? sums[n + 1] : none,
                    n + 2 < kCount ? sums[n + 2] : none, n + 3 < kCount ? sums[n + 3] : none));
  }
}
