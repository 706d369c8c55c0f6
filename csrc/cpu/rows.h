// The values of a row before quantization, and their rounding. Included by the files of the levels
// only, in an anonymous namespace, after simd.h. docs/internals/numerics.md has the order of the
// operations.

// --- norms ---------------------------------------------------------------------------------------

// The sum over a row of f of some values in float64. Lanes beyond the row must add 0.
template <typename F>
inline double sum_of(const float* v, int64_t k, const F& f) {
  Doubles low = {}, high = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    low += f(__builtin_convertvector(read<HalfFloats>(v + i), Doubles), i);
    high +=
        f(__builtin_convertvector(read<HalfFloats>(v + i + kHalfLanes), Doubles), i + kHalfLanes);
  }
  const Doubles both = low + high;
  double total = 0;
  for (int lane = 0; lane < kHalfLanes; ++lane) total += both[lane];
  return total;
}

inline Floats load_parameter(DType dtype, const void* from, int64_t i, int64_t count) {
  return visit_float(dtype,
                     [&](auto type) { return load_some<decltype(type)::value>(from, i, count); });
}

inline void apply_norm(const QuantizeParams& p, float* v) {
  const bool layer = p.producer == Producer::kLayerNorm;
  const auto k = static_cast<double>(p.k);
  double mean = 0, squares;
  if (layer) {
    mean = sum_of(v, p.k, [](Doubles x, int64_t) { return x; }) / k;
    squares = sum_of(v, p.k, [&](Doubles x, int64_t first) {
      Doubles distance = x - mean;
      for (int64_t lane = 0; first + kHalfLanes > p.k && lane < kHalfLanes; ++lane) {
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
template <int kH, int... kLane>
inline Floats stage(Floats v, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  const Floats other = __builtin_shufflevector(v, v, (kLane ^ kH)...);
#else
  const Floats other = __builtin_shuffle(v, Ints{(kLane ^ kH)...});
#endif
#if defined(__FMA__)
  // The product is exact, so the sum is rounded once.
  return fused_multiply_add(v, Floats{(kLane & kH ? -1.0f : 1.0f)...}, other);
#else
  const Ints signs = {(kLane & kH ? INT32_MIN : 0)...};
  return other + bits_as<Floats>(bits_as<Ints>(v) ^ signs);
#endif
}
template <int kH>
inline Floats stage(Floats v) {
  return stage<kH>(v, std::make_integer_sequence<int, kLanes>());
}

// The stages of a group within a vector, which may hold several groups.
inline Floats rotate_lanes(Floats v, int32_t group) {
  v = stage<1>(v);
  if (group >= 4) v = stage<2>(v);
  if constexpr (kLanes >= 8) {
    if (group >= 8) v = stage<4>(v);
  }
  if constexpr (kLanes >= 16) {
    if (group >= 16) v = stage<8>(v);
  }
  return v;
}

// The stages h = step, 2 step, ... of kCount values that are `step` channels apart.
template <int kCount>
inline void rotate_across(Floats (&r)[kCount]) {
#pragma GCC unroll 4
  for (int h = 1; h < kCount; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i & h) continue;
      const Floats low = r[i], high = r[i + h];
      r[i] = low + high;
      r[i + h] = low - high;
    }
  }
}

// One pass over a row in groups of kCount * step channels. Returns the largest bits.
template <int kCount>
inline Ints rotate_pass(float* v, int64_t k, int64_t step) {
  Ints most = {};
  for (int64_t group = 0; group < k; group += kCount * step) {
    for (int64_t i = group; i < group + step; i += kLanes) {
      Floats r[kCount];
      for (int j = 0; j < kCount; ++j) r[j] = read<Floats>(v + i + j * step);
      rotate_across(r);
      for (int j = 0; j < kCount; ++j) {
        write(v + i + j * step, r[j]);
        most = larger(most, bits_as<Ints>(magnitude(r[j])));
      }
    }
  }
  return most;
}

// The first pass, kCount vectors at a time: loads them, and takes all stages within them and among
// them.
template <int kCount, typename Load>
inline Ints rotate_first(float* v, int64_t k, int32_t group, const Load& load) {
  constexpr std::integral_constant<int64_t, kLanes> kWhole;
  Ints most = {};
  int64_t i = 0;
  for (; i + kCount * kLanes <= k; i += kCount * kLanes) {
    Floats r[kCount];
    for (int j = 0; j < kCount; ++j) r[j] = rotate_lanes(load(i + j * kLanes, kWhole), group);
    rotate_across(r);
    for (int j = 0; j < kCount; ++j) {
      write(v + i + j * kLanes, r[j]);
      most = larger(most, bits_as<Ints>(magnitude(r[j])));
    }
  }
  if (i < k) {  // only groups within a vector leave a rest, and its padding is groups of zeros
    const Floats r = rotate_lanes(load(i, k - i), group);
    write(v + i, r);
    most = larger(most, bits_as<Ints>(magnitude(r)));
  }
  return most;
}

// Rotates the values of a row that `load` gives, writes them to v, and returns the largest bits.
template <typename Load>
inline Ints rotate(float* v, int64_t k, int32_t group, const Load& load) {
  if (group <= kLanes) return rotate_first<1>(v, k, group, load);
  if (group == 2 * kLanes) return rotate_first<2>(v, k, group, load);
  if (group == 4 * kLanes) return rotate_first<4>(v, k, group, load);
  Ints most = rotate_first<8>(v, k, group, load);
  int64_t step = 8 * kLanes;
  for (; step * 8 <= group; step *= 8) most = rotate_pass<8>(v, k, step);
  if (step * 4 == group) most = rotate_pass<4>(v, k, step);
  if (step * 2 == group) most = rotate_pass<2>(v, k, step);
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
    const Floats added = load_lanes<kDType>(x, i, count) + load_lanes<kDType>(residual, i, count);
    store_lanes<kDType>(sum, i, added, count);
    write(v + i, load_lanes<kDType>(sum, i, count));
  });
}

// Smooths and rotates the values that `load` gives, and returns the largest bits.
template <bool kSmooth, typename Load>
inline Ints smooth_row(const QuantizeParams& p, float* v, const Load& load) {
  const auto smoothed = [&](int64_t i, auto count) {
    Floats r = load(i, count);
    if constexpr (kSmooth) r = r * load_lanes<DType::kFloat32>(p.inv_smooth, i, count);
    return r;
  };
  if (p.rotation != 0) return rotate(v, p.k, p.rotation, smoothed);
  Ints most = {};
  for_vectors(p.k, [&](int64_t i, auto count) {
    const Floats r = smoothed(i, count);
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
