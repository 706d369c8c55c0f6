// Vectors of floats and what the kernels do with them. Included by the files of the levels only, in
// an anonymous namespace: each level compiles its own copy with its own instructions.
//
// Every operation is one rounded float32 operation for each lane; the build forbids contraction
// (-ffp-contract=off).

// As many as a register of the level holds. The compiler handles longer vectors element by element.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kHalfLanes = kLanes / 2;

template <typename T, int64_t kCount>
struct VectorOf {
  using Type __attribute__((vector_size(kCount * sizeof(T)))) = T;
};
using Floats = VectorOf<float, kLanes>::Type;
using Ints = VectorOf<int32_t, kLanes>::Type;
using Words = VectorOf<uint32_t, kLanes>::Type;  // wrap around
using HalfFloats = VectorOf<float, kHalfLanes>::Type;
using Doubles = VectorOf<double, kHalfLanes>::Type;
using Shorts = VectorOf<uint16_t, kLanes>::Type;
using Bytes = VectorOf<int8_t, kLanes>::Type;

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <typename Vector>
inline Vector read(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <typename Vector>
inline void write(void* to, const Vector& v) {
  __builtin_memcpy(to, &v, sizeof v);
}
template <typename Vector>
inline Vector read_some(const void* from, int64_t count) {
  Vector v = {};
  __builtin_memcpy(&v, from, static_cast<size_t>(count) * sizeof(v[0]));
  return v;
}
template <typename Vector>
inline void write_some(void* to, const Vector& v, int64_t count) {
  __builtin_memcpy(to, &v, static_cast<size_t>(count) * sizeof(v[0]));
}

inline Floats broadcast(float value) { return value - Floats{}; }  // keeps -0
inline Ints broadcast_int(int32_t value) { return Ints{} + value; }

inline Floats magnitude(Floats v) {
  return bits_as<Floats>(bits_as<Ints>(v) & broadcast_int(0x7fffffff));
}

// The larger of two vectors of bits of |v|.
inline Ints larger(Ints a, Ints b) {
#if defined(__AVX512F__)
  return bits_as<Ints>(_mm512_max_epi32(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#else
  return a > b ? a : b;
#endif
}
inline uint32_t largest(Ints v) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found = v[i] > found ? v[i] : found;
  return static_cast<uint32_t>(found);
}

inline Floats fused_multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return bits_as<Floats>(
      _mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
  return bits_as<Floats>(
      _mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return v;
#endif
}

// --- 16-bit floats ------------------------------------------------------------------------------

inline Floats from_bfloat16(Shorts h) {
  return bits_as<Floats>(__builtin_convertvector(h, Ints) << 16);
}
// Rounds to nearest even; every NaN becomes the same one, as in torch.
inline Shorts to_bfloat16(Floats v) {
  const Ints bits = bits_as<Ints>(v);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints found = v == v ? (rounded >> 16) & 0xffff : broadcast_int(0x7fc0);
  return __builtin_convertvector(found, Shorts);
}

inline Floats from_float16(Shorts h) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(h)));
#elif defined(__F16C__)
  return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  const Ints wide = __builtin_convertvector(h, Ints);
  const Ints rest = wide & 0x7fff;
  // No operand is subnormal: a process may treat those as 0.
  const Ints subnormal = bits_as<Ints>(__builtin_convertvector(rest, Floats) * 0x1p-24f);
  Ints bits = rest < 0x400 ? subnormal : (rest << 13) + (112 << 23);
  bits = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : bits;
  return bits_as<Floats>(bits | ((wide & 0x8000) << 16));
#endif
}
inline Shorts to_float16(Floats v) {
#if defined(__AVX512F__)
  return bits_as<Shorts>(_mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_as<Shorts>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Ints bits = bits_as<Ints>(v);
  const Ints rest = bits & 0x7fffffff;
  // Normal results: rebias the exponent and round the 13 bits that fall away. A carry into the
  // exponent is right, up to Inf.
  const Ints normal = (rest - (112 << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
  // Subnormal results: this addition aligns the bits to keep with the end of a float32.
  const Floats aligned = bits_as<Floats>(rest) + 0.5f;
  const Ints subnormal = bits_as<Ints>(aligned) - bits_as<Ints>(broadcast(0.5f));
  Ints found = rest < (113 << 23) ? subnormal : normal;
  found = rest >= 0x47800000 ? broadcast_int(0x7c00) : found;  // 2^16 and above
  found = rest > 0x7f800000 ? 0x7e00 | ((rest >> 13) & 0x1ff) : found;
  return __builtin_convertvector(found | ((bits >> 16) & 0x8000), Shorts);
#endif
}

// --- loads and stores of any type ---------------------------------------------------------------

template <DType kDType>
inline const char* row_of(const void* rows, int64_t stride, int64_t row) {
  return static_cast<const char*>(rows) + row * stride * kDTypeFacts[int(kDType)].bytes;
}

template <DType kDType>
inline Floats load(const void* from, int64_t index) {
  if constexpr (kDType == DType::kFloat32) {
    return read<Floats>(static_cast<const float*>(from) + index);
  } else {
    const Shorts h = read<Shorts>(static_cast<const uint16_t*>(from) + index);
    return kDType == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
  }
}
template <DType kDType>
inline Floats load_some(const void* from, int64_t index, int64_t count) {
  if constexpr (kDType == DType::kFloat32) {
    return read_some<Floats>(static_cast<const float*>(from) + index, count);
  } else {
    const Shorts h = read_some<Shorts>(static_cast<const uint16_t*>(from) + index, count);
    return kDType == DType::kFloat16 ? from_float16(h) : from_bfloat16(h);
  }
}
template <DType kDType>
inline void store_some(void* to, int64_t index, Floats v, int64_t count) {
  if constexpr (kDType == DType::kFloat32) {
    write_some(static_cast<float*>(to) + index, v, count);
  } else {
    const Shorts h = kDType == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
    write_some(static_cast<uint16_t*>(to) + index, h, count);
  }
}
template <DType kDType>
inline void store(void* to, int64_t index, Floats v) {
  store_some<kDType>(to, index, v, kLanes);
}

// Calls f(index, count) for the vectors of `size` elements. `count` is a constant for all but the
// last.
template <typename F>
inline void for_vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < size) f(i, size - i);
}
// The same by a type's loads, whose `count` says whether all lanes are there.
template <DType kDType, typename Count>
inline Floats load_lanes(const void* from, int64_t index, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return load_some<kDType>(from, index, count);
  } else {
    return load<kDType>(from, index);
  }
}
template <DType kDType, typename Count>
inline void store_lanes(void* to, int64_t index, Floats v, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    store_some<kDType>(to, index, v, count);
  } else {
    store<kDType>(to, index, v);
  }
}

// --- rounding -----------------------------------------------------------------------------------

// int8(rint(v)) for |v| <= 2^21. Adding 1.5 * 2^23 rounds to an integer, half to even, whose bits
// are then the last of the sum.
inline Bytes round_small(Floats v) {
  const Ints bits = bits_as<Ints>(v + 12582912.0f);
#if defined(__AVX512F__)
  return bits_as<Bytes>(_mm512_cvtepi32_epi8(bits_as<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i first = _mm256_shuffle_epi8(
      bits_as<__m256i>(bits), _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                  0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)));
  const __m128i both =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1));
  return bits_as<Bytes>(_mm_cvtsi128_si64(both));
#else
  return __builtin_convertvector(bits, Bytes);
#endif
}
// clamp(rint(v), -127, 127); NaN becomes 0.
inline Bytes round_any(Floats v) {
  v = v == v ? v : broadcast(0.0f);
  v = v > 127.0f ? broadcast(127.0f) : v;
  v = v < -127.0f ? broadcast(-127.0f) : v;
  return round_small(v);
}
