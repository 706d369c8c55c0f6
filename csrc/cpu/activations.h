// Activation functions in float64, whose results are rounded once. Included by the files of the
// levels only, in an anonymous namespace, after simd.h.

using Longs = VectorOf<uint64_t, kHalfLanes>::Type;  // wrap around

inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return bits_as<Doubles>(
      _mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
#elif defined(__FMA__)
  return bits_as<Doubles>(
      _mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// exp(x) to about one unit in the last place; 0 and Inf beyond float64's normal range.
inline Doubles exponential(Doubles x) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, in the last bits
  const Doubles shifted = x * 1.44269504088896340736 + kRound;
  const Doubles n = shifted - kRound;
  // ln 2 in two parts. The product with the first is exact.
  Doubles r = multiply_add(n, Doubles{} - 6.93147180369123816490e-01, x);
  r = multiply_add(n, Doubles{} - 1.90821492927058770002e-10, r);
  // The Taylor series: |r| <= ln 2 / 2, so the first term left out is below 2^-57.
  Doubles p = Doubles{} + 1.0 / 6227020800.0;
  constexpr double kRest[] = {1.0 / 479001600.0,
                              1.0 / 39916800.0,
                              1.0 / 3628800.0,
                              1.0 / 362880.0,
                              1.0 / 40320.0,
                              1.0 / 5040.0,
                              1.0 / 720.0,
                              1.0 / 120.0,
                              1.0 / 24.0,
                              1.0 / 6.0,
                              1.0 / 2.0,
                              1.0,
                              1.0};
  for (double coefficient : kRest) p = multiply_add(p, r, Doubles{} + coefficient);
  const Longs exponent = bits_as<Longs>(shifted) << 52;
  Doubles y = bits_as<Doubles>(bits_as<Longs>(p) + exponent);
  y = x > 709.0 ? Doubles{} + __builtin_inf() : y;
  y = x < -708.0 ? Doubles{} : y;
  return x == x ? y : x;
}

template <Producer kProducer>
inline Doubles activate(Doubles t) {
  if constexpr (kProducer == Producer::kRelu) {
    return t < 0.0 ? Doubles{} : t;  // keeps NaN
  } else if constexpr (kProducer == Producer::kGelu) {
    Doubles y;
    for (int lane = 0; lane < kHalfLanes; ++lane) {
      y[lane] = t[lane] * 0.5 * (1.0 + std::erf(t[lane] * 0.70710678118654752440));
    }
    return y;
  } else if constexpr (kProducer == Producer::kGeluTanh) {
    // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
    constexpr double kTwiceRoot = 1.59576912160573071176;  // 2 sqrt(2 / pi)
    const Doubles u = kTwiceRoot * (t + 0.044715 * (t * t * t));
    return t / (1.0 + exponential(-u));
  } else {
    static_assert(kProducer == Producer::kSilu);
    return t / (1.0 + exponential(-t));
  }
}

template <Producer kProducer>
inline HalfFloats activate(HalfFloats t) {
  return __builtin_convertvector(activate<kProducer>(__builtin_convertvector(t, Doubles)),
                                 HalfFloats);
}

template <Producer kProducer>
inline Floats activate(Floats t) {
  float values[kLanes];
  write(values, t);
  write(values, activate<kProducer>(read<HalfFloats>(values)));
  write(values + kHalfLanes, activate<kProducer>(read<HalfFloats>(values + kHalfLanes)));
  return read<Floats>(values);
}

// act(v), or act(gate) * v.
template <Producer kProducer, DType kDType>
void apply_activation(const QuantizeParams& p, int64_t row, float* v) {
  if (p.gate == nullptr) {
    // Lanes beyond the row hold 0, and every function is 0 there.
    for (int64_t i = 0; i < p.k; i += kLanes)
      write(v + i, activate<kProducer>(read<Floats>(v + i)));
    return;
  }
  const char* gate = row_of<kDType>(p.gate, p.gate_stride, row);
  for_vectors(p.k, [&](int64_t i, auto count) {
    write(v + i, activate<kProducer>(load_lanes<kDType>(gate, i, count)) * read<Floats>(v + i));
  });
}
