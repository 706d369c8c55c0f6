// The same as scores.h with 8-bit dot products of 512 bits. Included by the files of the levels
// only, in an anonymous namespace, after interleaved.h.
//
// Adding up the lanes of each score would take longer than the products. So 16 keys are transposed,
// and each lane is a key.

constexpr int64_t kQueryRows = 8;
constexpr int64_t kTileStride = kTokenTile + 64;

struct Queries {
  alignas(64) int8_t of[kQueryRows * kMaxHead];
  int32_t excess[kQueryRows];  // 128 times the sum of a row: a key is k + 128, in [0, 255]

  void pack(const int8_t* q, int64_t rows) {
    std::memcpy(of, q, static_cast<size_t>(rows * kMaxHead));
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < kMaxHead; ++i) sum += of[r * kMaxHead + i];
      excess[r] = 128 * sum;
    }
  }
};

// Adds the products of 4 channels of a query and of 16 keys.
inline __m512i add_four(__m512i sum, __m512i keys, const int8_t* q) {
  // As assembly for the same reason as in dot512.h.
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(keys), "m"(*reinterpret_cast<const int32_t (*)[1]>(q)));
  return sum;
}

// The scores of kRows rows and up to 16 keys. Two sums a row, because each product waits for the
// one before it.
template <int kRows>
inline void multiply_keys(const Queries& q, int64_t first, const int8_t* k, int64_t width,
                          int64_t tokens, int32_t* sums) {
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i acc[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = _mm512_set1_epi32(-q.excess[first + r]);
    acc[r][1] = _mm512_setzero_si512();
  }
  for (int64_t at = 0; at < width; at += kPackedStep) {
    const int64_t left = width - at;
    const __mmask64 mask = left < kPackedStep ? (__mmask64{1} << left) - 1 : ~__mmask64{0};
    __m512i channels[16];
    const auto key = [&](int64_t i) {
      const __m512i row = _mm512_maskz_loadu_epi8(mask, k + (i < tokens ? i : 0) * width + at);
      return _mm512_xor_si512(row, shift);
    };
    transpose(key, channels);
    for (int i = 0; i < 16; ++i) {
      for (int r = 0; r < kRows; ++r) {
        acc[r][i % 2] =
            add_four(acc[r][i % 2], channels[i], q.of + (first + r) * kMaxHead + at + kFour * i);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(sums + r * kTileStride, _mm512_add_epi32(acc[r][0], acc[r][1]));
  }
}

inline void multiply_queries(const Queries& q, int64_t rows, const int8_t* k, int64_t width,
                             int64_t tokens, int32_t* sums) {
  for (int64_t t = 0; t < tokens; t += 16, k += 16 * width) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      multiply_keys<4>(q, r, k, width, tokens - t, sums + r * kTileStride + t);
    }
    int32_t* const rest = sums + r * kTileStride + t;
    switch (rows - r) {
      case 3:
        multiply_keys<3>(q, r, k, width, tokens - t, rest);
        break;
      case 2:
        multiply_keys<2>(q, r, k, width, tokens - t, rest);
        break;
      case 1:
        multiply_keys<1>(q, r, k, width, tokens - t, rest);
        break;
    }
  }
}
