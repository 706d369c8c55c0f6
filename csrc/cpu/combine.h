// The weighted sum of the results that a token's experts gave. Included by the files of the levels
// only, in an anonymous namespace, after simd.h.

// Sums that wait in the L1 cache while the choices pass by: their weights are then read a few times
// only, and each result as one run of memory.
constexpr int64_t kCombinePanel = 1024;

inline float weight_of(const CombineParams& p, int64_t index) {
  return visit_float(p.weights_dtype, [&](auto type) {
    return load_some<decltype(type)::value>(p.weights, index, 1)[0];
  });
}

template <DType kDType>
inline void combine_columns(const CombineParams& p, int64_t token, int64_t first, int64_t columns) {
  alignas(64) float sums[kCombinePanel];
  const int64_t padded = round_up(columns, kLanes);
  for (int64_t i = 0; i < padded; i += kLanes) write(sums + i, broadcast(-0.0f));  // x + -0 is x
  for (int64_t c = 0; c < p.choices; ++c) {
    const int64_t index = token * p.choices + c, found = p.position[index];
    const int64_t row = found < 0 ? 0 : found < p.y_rows ? found : p.y_rows - 1;
    const char* y = row_of<kDType>(p.y, p.y_stride, row);
    const Floats weight = broadcast(weight_of(p, index));
    for_vectors(columns, [&](int64_t i, auto count) {
      const Floats v = load_lanes<kDType>(y, first + i, count);
      write(sums + i, fused_multiply_add(weight, v, read<Floats>(sums + i)));
    });
  }
  char* const out = const_cast<char*>(row_of<kDType>(p.out, p.out_stride, token));
  for_vectors(columns, [&](int64_t i, auto count) {
    store_lanes<kDType>(out, first + i, read<Floats>(sums + i), count);
  });
}

void combine_token(const CombineParams& p, int64_t token) {
  visit_float(p.dtype, [&](auto type) {
    for (int64_t first = 0; first < p.n; first += kCombinePanel) {
      const int64_t left = p.n - first;
      combine_columns<decltype(type)::value>(p, token, first,
                                             left < kCombinePanel ? left : kCombinePanel);
    }
  });
}
