// AVX-512, VNNI and AMX in plain C++, for processors that lack them: the intrinsics and assembly
// that the CPU kernels use, by what Intel's manual says that they do. test_cpu_kernels.py includes
// this before everything else, and replaces the assembly by the functions at the end. Needs AVX2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace {
namespace emulated {

// The lanes of a vector.
template <typename Lane, typename Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Lane);
  Lane of[kCount];
  Lanes() = default;
  explicit Lanes(const Vector& v) { std::memcpy(of, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, of, sizeof v);
    return v;
  }
};

template <typename Lane, typename Vector = __m512i, typename F>
inline Vector each(const F& f) {
  Lanes<Lane, Vector> to;
  for (int i = 0; i < to.kCount; ++i) to.of[i] = static_cast<Lane>(f(i));
  return to.vector();
}
// f(a, b) of each lane.
template <typename Lane, typename Vector = __m512i, typename F>
inline Vector each(const Vector& a, const Vector& b, const F& f) {
  const Lanes<Lane, Vector> left(a), right(b);
  return each<Lane, Vector>([&](int i) { return f(left.of[i], right.of[i]); });
}

inline __m512i loadu(const void* from) {
  __m512i v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void storeu(void* to, __m512i v) { std::memcpy(to, &v, sizeof v); }
inline __m512i setzero() {
  return each<int8_t>([](int) { return 0; });
}
template <typename Lane>
inline __m512i set1(Lane value) {
  return each<Lane>([&](int) { return value; });
}
template <typename... Values>
inline __m512i setr_epi32(Values... values) {
  const int32_t of[] = {values...};
  return loadu(of);
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  return each<uint32_t>(a, b, [](uint32_t l, uint32_t r) { return l + r; });
}
inline __m512i add_epi8(__m512i a, __m512i b) {
  return each<uint8_t>(a, b, [](uint8_t l, uint8_t r) { return l + r; });
}
inline __m512i and_bits(__m512i a, __m512i b) {
  return each<uint64_t>(a, b, [](uint64_t l, uint64_t r) { return l & r; });
}
inline __m512i xor_bits(__m512i a, __m512i b) {
  return each<uint64_t>(a, b, [](uint64_t l, uint64_t r) { return l ^ r; });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
  return each<int32_t>(a, b, [](int32_t l, int32_t r) { return l > r ? l : r; });
}
inline __m512i mullo_epi16(__m512i a, __m512i b) {
  return each<uint16_t>(a, b, [](uint32_t l, uint32_t r) { return l * r; });
}
inline __m512i srli_epi16(__m512i a, int count) {
  const Lanes<uint16_t, __m512i> from(a);
  return each<uint16_t>([&](int i) { return from.of[i] >> count; });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  const Lanes<int16_t, __m512i> l(a), r(b);
  return each<uint32_t>([&](int i) {
    return static_cast<uint32_t>(l.of[2 * i] * r.of[2 * i]) +
           static_cast<uint32_t>(l.of[2 * i + 1] * r.of[2 * i + 1]);
  });
}
inline int32_t reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (uint32_t lane : Lanes<uint32_t, __m512i>(a).of) sum += lane;
  return static_cast<int32_t>(sum);
}
inline __m512i maskz_loadu_epi8(uint64_t mask, const void* from) {
  return each<uint8_t>(
      [&](int i) { return mask >> i & 1 ? static_cast<const uint8_t*>(from)[i] : 0; });
}
inline __m512i maskz_mov_epi8(uint64_t mask, __m512i v) {
  const Lanes<uint8_t, __m512i> from(v);
  return each<uint8_t>([&](int i) { return mask >> i & 1 ? from.of[i] : 0; });
}
inline __m512i permutex2var_epi32(__m512i a, __m512i order, __m512i b) {
  const Lanes<uint32_t, __m512i> first(a), second(b), index(order);
  return each<uint32_t>([&](int i) {
    const uint32_t at = index.of[i] % 32;
    return at < 16 ? first.of[at] : second.of[at - 16];
  });
}
// Lanes from the low or high halves of each 128 bits, in turns.
template <typename Lane>
inline __m512i unpack(__m512i a, __m512i b, bool high) {
  constexpr int kBlock = 16 / sizeof(Lane);
  const Lanes<Lane, __m512i> first(a), second(b);
  return each<Lane>([&](int i) {
    const int at = i / kBlock * kBlock + high * kBlock / 2 + i % kBlock / 2;
    return i % 2 == 0 ? first.of[at] : second.of[at];
  });
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int order) {
  const Lanes<uint64_t, __m512i> first(a), second(b);
  return each<uint64_t>([&](int i) {
    const int block = order >> (i / 2 * 2) & 3;
    return (i < 4 ? first : second).of[2 * block + i % 2];
  });
}
inline __m256i half_of(__m512i v, int half) {
  return each<uint64_t, __m256i>(
      [&](int i) { return Lanes<uint64_t, __m512i>(v).of[4 * half + i]; });
}
inline __m512 join(__m256 low, __m256 high) {
  __m512 v;
  std::memcpy(&v, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof low, &high, sizeof high);
  return v;
}
inline __m512 cvtph_ps(__m256i v) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
inline __m256i cvtps_ph(__m512 v) {
  __m256 half[2];
  std::memcpy(half, &v, sizeof v);
  return _mm256_setr_m128i(_mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
}
inline void stream_ps(void* to, __m512 v) { std::memcpy(to, &v, sizeof v); }
inline __m128i cvtepi32_epi8(__m512i v) {
  const Lanes<int32_t, __m512i> from(v);
  return each<uint8_t, __m128i>([&](int i) { return from.of[i]; });
}
inline __m128i half_cvtepi32_epi8(__m256i v) {
  const Lanes<int32_t, __m256i> from(v);
  return each<uint8_t, __m128i>([&](int i) { return i < from.kCount ? from.of[i] : 0; });
}
inline __m512i cvtepi8_epi32(__m128i v) {
  const Lanes<int8_t, __m128i> from(v);
  return each<int32_t>([&](int i) { return from.of[i]; });
}
inline __m512 cvtepi32_ps(__m512i v) {
  const Lanes<int32_t, __m512i> from(v);
  return each<float, __m512>([&](int i) { return from.of[i]; });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  return each<float, __m512>(a, b, [](float l, float r) { return l > r ? l : r; });
}
template <typename Lane, typename Vector>
inline Vector fmadd(Vector a, Vector b, Vector c) {
  const Lanes<Lane, Vector> x(a), y(b), z(c);
  return each<Lane, Vector>([&](int i) { return std::fma(x.of[i], y.of[i], z.of[i]); });
}

// --- VNNI, in place of assembly ------------------------------------------------------------------

// Adds the products of 4 uint8 and int8, or of 2 int16, to the lanes of a sum.
template <typename A, typename B, typename Vector>
inline Vector dot(const Vector& sum, const Vector& a, const Vector& b) {
  constexpr int kProducts = 4 / sizeof(A);
  const Lanes<A, Vector> left(a);
  const Lanes<B, Vector> right(b);
  const Lanes<uint32_t, Vector> before(sum);
  return each<uint32_t, Vector>([&](int i) {
    uint32_t total = before.of[i];
    for (int j = kProducts * i; j < kProducts * (i + 1); ++j) {
      total += static_cast<uint32_t>(left.of[j] * right.of[j]);
    }
    return total;
  });
}
template <typename Vector>
inline void vpdpbusd(Vector& sum, const Vector& a, const Vector& b) {
  sum = dot<uint8_t, int8_t>(sum, a, b);
}
template <typename Vector>
inline void vpdpwssd(Vector& sum, const Vector& a, const Vector& b) {
  sum = dot<int16_t, int16_t>(sum, a, b);
}

// --- tiles ---------------------------------------------------------------------------------------

struct Tiles {
  uint8_t config[64];
  uint8_t of[8][16][64];

  int rows(int tile) const { return config[48 + tile]; }
  int bytes(int tile) const { return config[16 + 2 * tile]; }  // at most 64
};
inline thread_local Tiles tiles;

inline void tile_loadconfig(const void* from) {
  std::memcpy(tiles.config, from, sizeof tiles.config);
  std::memset(tiles.of, 0, sizeof tiles.of);
}
inline void tile_zero(int tile) { std::memset(tiles.of[tile], 0, sizeof tiles.of[tile]); }
inline void tile_loadd(int tile, const void* from, int64_t stride) {
  tile_zero(tile);
  for (int row = 0; row < tiles.rows(tile); ++row) {
    std::memcpy(tiles.of[tile][row], static_cast<const char*>(from) + row * stride,
                static_cast<size_t>(tiles.bytes(tile)));
  }
}
inline void tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles.rows(tile); ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.of[tile][row],
                static_cast<size_t>(tiles.bytes(tile)));
  }
}
inline void tile_dpbssd(int c, int a, int b) {
  for (int m = 0; m < tiles.rows(c); ++m) {
    for (int n = 0; n < tiles.bytes(c) / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, &tiles.of[c][m][4 * n], 4);
      for (int k = 0; k < tiles.bytes(a); ++k) {
        const int product = static_cast<int8_t>(tiles.of[a][m][k]) *
                            static_cast<int8_t>(tiles.of[b][k / 4][4 * n + k % 4]);
        sum += static_cast<uint32_t>(product);
      }
      std::memcpy(&tiles.of[c][m][4 * n], &sum, 4);
    }
  }
}

}  // namespace emulated
}  // namespace

#ifdef EMULATED_512  // not for levels that have vectors of 256 bits
#define __AVX512F__ 1
#define __AVX512BW__ 1
#endif
#define _mm512_loadu_si512 emulated::loadu
#define _mm512_load_si512 emulated::loadu
#define _mm512_storeu_si512 emulated::storeu
#define _mm512_store_si512 emulated::storeu
#define _mm512_setzero_si512 emulated::setzero
#define _mm512_set1_epi8 emulated::set1<int8_t>
#define _mm512_set1_epi16 emulated::set1<int16_t>
#define _mm512_set1_epi32 emulated::set1<int32_t>
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_epi8 emulated::add_epi8
#define _mm512_and_si512 emulated::and_bits
#define _mm512_xor_si512 emulated::xor_bits
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_mullo_epi16 emulated::mullo_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_maskz_mov_epi8 emulated::maskz_mov_epi8
#define _mm512_permutex2var_epi32 emulated::permutex2var_epi32
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<uint32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<uint32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<uint64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<uint64_t>(a, b, true)
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_castsi512_si256(v) emulated::half_of(v, 0)
#define _mm512_extracti64x4_epi64(v, half) emulated::half_of(v, half)
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm256_cvtepi32_epi8 emulated::half_cvtepi32_epi8
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_fmadd_ps emulated::fmadd<float, __m512>
#define _mm512_fmadd_pd emulated::fmadd<double, __m512d>
#define _mm512_stream_ps emulated::stream_ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release()
#undef _tile_zero
#define _tile_zero emulated::tile_zero
#undef _tile_loadd
#define _tile_loadd emulated::tile_loadd
#undef _tile_stored
#define _tile_stored emulated::tile_stored
#undef _tile_dpbssd
#define _tile_dpbssd emulated::tile_dpbssd
