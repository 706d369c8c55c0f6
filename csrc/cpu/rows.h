// The values of a row before quantization, and their rounding. Included by the files of the levels
// only, in an anonymous namespace, after simd.h. docs/internals/numerics.md has the order of the
// operations.

template <DType kDType>
inline const char* row_of(const void* rows, int64_t stride, int64_t row) {
  return static_cast<const char*>(rows) + row * stride * kDTypeFacts[int(kDType)].bytes;
}

// --- activation functions, in float64, rounded once ----------------------------------------------

template <Producer kProducer>
inline double activate(double t) {
  if constexpr (kProducer == Producer::kRelu) {
    return t < 0.0 ? 0.0 : t;  // keeps NaN
  } else if constexpr (kProducer == Producer::kGelu) {
    return t * 0.5 * (1.0 + std::erf(t * 0.70710678118654752440));
  } else if constexpr (kProducer == Producer::kGeluTanh) {
    constexpr double kBeta = 1.41421356237309504880 * 1.12837916709551257390 * 0.5;
    return 0.5 * t * (1.0 + std::tanh(kBeta * (t + 0.044715 * (t * t * t))));
  } else {
    static_assert(kProducer == Producer::kSilu);
    return t / (1.0 + std::exp(-t));
  }
}

template <Producer kProducer, DType kDType>
void apply_activation(const QuantizeParams& p, int64_t row, float* v) {
  if (p.gate == nullptr) {
    for (int64_t i = 0; i < p.k; ++i) {
      v[i] = static_cast<float>(activate<kProducer>(static_cast<double>(v[i])));
    }
    return;
  }
  const char* gate = row_of<kDType>(p.gate, p.gate_stride, row);
  for_vectors(p.k, [&](int64_t i, auto count) {
    const Floats t = load_lanes<kDType>(gate, i, count);
    Floats factor = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      factor[lane] = static_cast<float>(activate<kProducer>(static_cast<double>(t[lane])));
    }
    write(v + i, factor * read<Floats>(v + i));
  });
}

// --- norms ---------------------------------------------------------------------------------------

// The sum over a row of f of 8 values in float64. Lanes beyond the row must add 0.
template <typename F>
inline double sum_of(const float* v, int64_t k, const F& f) {
  Doubles low = {}, high = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    low += f(__builtin_convertvector(read<HalfFloats>(v + i), Doubles), i);
    high += f(__builtin_convertvector(read<HalfFloats>(v + i + 8), Doubles), i + 8);
  }
  const Doubles both = low + high;
  double total = 0;
  for (int lane = 0; lane < 8; ++lane) total += both[lane];
  return total;
}

inline Floats load_parameter(DType dtype, const void* from, int64_t i, int64_t count) {
  return visit_float(dtype, [&](auto type) {
    return load_some<decltype(type)::value>(from, i, count);
  });
}

inline void apply_norm(const QuantizeParams& p, float* v) {
  const bool layer = p.producer == Producer::kLayerNorm;
  const auto k = static_cast<double>(p.k);
  double mean = 0, squares;
  if (layer) {
    mean = sum_of(v, p.k, [](Doubles x, int64_t) { return x; }) / k;
    squares = sum_of(v, p.k, [&](Doubles x, int64_t first) {
      Doubles distance = x - mean;
      for (int64_t lane = 0; first + 8 > p.k && lane < 8; ++lane) {
        if (first + lane >= p.k) distance[lane] = 0;
      }
      return distance * distance;
    });
  } else {
    squares = sum_of(v, p.k, [](Doubles x, int64_t) { return x * x; });
  }
  const auto rstd = static_cast<float>(1.0 / std::sqrt(squares / k + p.eps));
  const auto center = static_cast<float>(mean);
  for_vectors(p.k, [&](int64_t i, int64_t count) {
    Floats y = read<Floats>(v + i);
    if (layer) y = y - center;
    y = y * rstd;
    if (p.weight != nullptr) y = y * load_parameter(p.weight_dtype, p.weight, i, count);
    if (p.bias != nullptr) y = y + load_parameter(p.bias_dtype, p.bias, i, count);
    write_some(v + i, y, count);
  });
}

// --- rotation ------------------------------------------------------------------------------------

// One stage within a vector: v[i], v[i + kH] = v[i] + v[i + kH], v[i] - v[i + kH].
template <int kH>
inline Floats stage(Floats v) {
  constexpr auto flip = [](int i) { return i ^ kH; };
  const Ints other = {flip(0), flip(1), flip(2),  flip(3),  flip(4),  flip(5),  flip(6),  flip(7),
                      flip(8), flip(9), flip(10), flip(11), flip(12), flip(13), flip(14), flip(15)};
  constexpr auto sign = [](int i) { return i & kH ? static_cast<int32_t>(0x80000000u) : 0; };
  const Ints signs = {sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
                      sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
#if defined(__clang__)
  const Floats exchanged =
      __builtin_shufflevector(v, v, flip(0), flip(1), flip(2), flip(3), flip(4), flip(5), flip(6),
                              flip(7), flip(8), flip(9), flip(10), flip(11), flip(12), flip(13),
                              flip(14), flip(15));
  (void)other;
#else
  const Floats exchanged = __builtin_shuffle(v, other);
#endif
  // In the upper half, -v[i + h] + v[i]: the same rounding as v[i] - v[i + h].
  return exchanged + bits_as<Floats>(bits_as<Ints>(v) ^ signs);
}

// The stages within the vectors of a group of at least 16 channels, or of several smaller groups.
inline Floats rotate_vector(Floats v, int32_t group) {
  v = stage<1>(v);
  if (group >= 4) v = stage<2>(v);
  if (group >= 8) v = stage<4>(v);
  if (group >= 16) v = stage<8>(v);
  return v;
}

// Rotates the kVectors * 16 channels of a group, and returns the largest bits.
template <int kVectors>
inline Ints rotate_group(float* v, Ints most) {
  Floats r[kVectors];
  for (int i = 0; i < kVectors; ++i) r[i] = rotate_vector(read<Floats>(v + kLanes * i), 16);
#pragma GCC unroll 5
  for (int h = 1; h < kVectors; h *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      if (i & h) continue;
      const Floats low = r[i], high = r[i + h];
      r[i] = low + high;
      r[i + h] = low - high;
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    write(v + kLanes * i, r[i]);
    most = larger(most, bits_as<Ints>(magnitude(r[i])));
  }
  return most;
}

template <int kVectors>
inline Ints rotate_groups(float* v, int64_t k) {
  Ints most = {};
  for (int64_t i = 0; i < k; i += kLanes * kVectors) most = rotate_group<kVectors>(v + i, most);
  return most;
}

// Rotates a row, and returns the largest bits.
inline Ints rotate(float* v, int64_t k, int32_t group) {
  switch (group) {
    case 16:
      return rotate_groups<1>(v, k);
    case 32:
      return rotate_groups<2>(v, k);
    case 64:
      return rotate_groups<4>(v, k);
    case 128:
      return rotate_groups<8>(v, k);
    case 256:
      return rotate_groups<16>(v, k);
    case 512:
      return rotate_groups<32>(v, k);
    default:
      break;
  }
  Ints most = {};
  for (int64_t i = 0; i < k; i += kLanes) {  // the padding is whole groups of zeros
    const Floats r = rotate_vector(read<Floats>(v + i), group);
    write(v + i, r);
    most = larger(most, bits_as<Ints>(magnitude(r)));
  }
  return most;
}

// --- rows ----------------------------------------------------------------------------------------

// x, or x + residual rounded to x's type.
template <DType kDType>
inline void load_row(const QuantizeParams& p, int64_t row, float* v) {
  const char* x = row_of<kDType>(p.x, p.x_stride, row);
  if (p.residual == nullptr) {
    for_vectors(p.k, [&](int64_t i, auto count) { write(v + i, load_lanes<kDType>(x, i, count)); });
    return;
  }
  const char* residual = row_of<kDType>(p.residual, p.residual_stride, row);
  char* sum = const_cast<char*>(row_of<kDType>(p.sum, p.sum_stride, row));
  for_vectors(p.k, [&](int64_t i, auto count) {
    const Floats added =
        load_lanes<kDType>(x, i, count) + load_lanes<kDType>(residual, i, count);
    store_lanes<kDType>(sum, i, added, count);
    write(v + i, load_lanes<kDType>(sum, i, count));
  });
}

// Smooths, and returns the largest bits.
template <bool kSmooth, typename Load>
inline Ints smooth_row(const QuantizeParams& p, float* v, const Load& load) {
  Ints most = {};
  for_vectors(p.k, [&](int64_t i, auto count) {
    Floats r = load(i, count);
    if constexpr (kSmooth) r = r * load_lanes<DType::kFloat32>(p.inv_smooth, i, count);
    write(v + i, r);
    most = larger(most, bits_as<Ints>(magnitude(r)));
  });
  return most;
}
template <typename Load>
inline Ints smooth_row(const QuantizeParams& p, float* v, const Load& load) {
  return p.inv_smooth != nullptr ? smooth_row<true>(p, v, load) : smooth_row<false>(p, v, load);
}

template <DType kDType>
void activate_row(const QuantizeParams& p, int64_t row, float* v) {
  switch (p.producer) {
    case Producer::kRelu:
      return apply_activation<Producer::kRelu, kDType>(p, row, v);
    case Producer::kGelu:
      return apply_activation<Producer::kGelu, kDType>(p, row, v);
    case Producer::kGeluTanh:
      return apply_activation<Producer::kGeluTanh, kDType>(p, row, v);
    default:
      return apply_activation<Producer::kSilu, kDType>(p, row, v);
  }
}

template <DType kDType>
uint32_t values_of(const QuantizeParams& p, int64_t row, float* v) {
  const int64_t padded = round_up(p.k, kVector);
  // Lanes beyond the row are written below, whole vectors beyond it are not.
  for (int64_t i = p.k / kLanes * kLanes; i < padded; i += kLanes) write(v + i, Floats{});
  Ints most;
  if (p.producer == Producer::kQuantize) {
    const char* x = row_of<kDType>(p.x, p.x_stride, row);
    most = smooth_row(p, v, [&](int64_t i, auto count) { return load_lanes<kDType>(x, i, count); });
  } else {
    load_row<kDType>(p, row, v);
    if (is_norm(p.producer)) {
      apply_norm(p, v);
    } else {
      activate_row<kDType>(p, row, v);
    }
    most = smooth_row(p, v, [&](int64_t i, auto) { return read<Floats>(v + i); });
  }
  if (p.rotation != 0) most = rotate(v, p.k, p.rotation);
  return largest(most);
}

uint32_t values(const QuantizeParams& p, int64_t row, float* v) {
  return visit_float(p.dtype,
                     [&](auto type) { return values_of<decltype(type)::value>(p, row, v); });
}

void round_values(const float* v, int64_t count, float inverse, bool ordinary, int8_t* x_q) {
  const int64_t padded = round_up(count, kLanes);
  if (ordinary) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      write(x_q + i, round_small(read<Floats>(v + i) * inverse));
    }
  } else {
    for (int64_t i = 0; i < padded; i += kLanes) {
      write(x_q + i, round_any(read<Floats>(v + i) * inverse));
    }
  }
}
