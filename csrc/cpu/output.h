// From the sums of a GEMM to y. Included by the files of the levels only, in an anonymous
// namespace, after simd.h.

// What turns sums into y. The caller keeps it in local variables, because the compiler must assume
// that y overwrites the rest.
struct Output {
  void* y;  // row 0 of the whole output, as in GemmParams
  int64_t y_stride;
  const void* residual;
  int64_t residual_stride;
  DType residual_dtype;
  int32_t relu;
  float inverse;

  explicit Output(const Block& block)
      : y(block.gemm->y),
        y_stride(block.gemm->y_stride),
        residual(block.gemm->residual),
        residual_stride(block.gemm->residual_stride),
        residual_dtype(block.gemm->residual_dtype),
        relu(block.gemm->relu),
        inverse(block.out_inverse) {}
};

// fma(sum * w_scale, x_scale, bias) + residual for the columns n of row m, or what is rounded to
// int8. `count`: as in `for_vectors`.
template <DType kDType, bool kBias, typename Count>
inline Floats dequantize(const Output& to, Ints sum, Floats w_scale, Floats x_scale, Floats bias,
                         int64_t m, int64_t n, Count count) {
  Floats v = __builtin_convertvector(sum, Floats) * w_scale;
  v = kBias ? fused_multiply_add(v, x_scale, bias) : v * x_scale;
  if constexpr (kDType == DType::kInt8) {
    if (to.relu) v = v < 0.0f ? Floats{} : v;
    return v * to.inverse;
  } else {
    if (to.residual == nullptr) return v;
    return v + visit_float(to.residual_dtype, [&](auto type) {
             constexpr DType kResidual = decltype(type)::value;
             const char* residual = row_of<kResidual>(to.residual, to.residual_stride, m);
             return load_lanes<kResidual>(residual, n, count);
           });
  }
}

template <DType kDType, typename Count>
inline void write_output(const Output& to, Floats v, int64_t m, int64_t n, Count count) {
  char* const y = static_cast<char*>(to.y) + m * to.y_stride * kDTypeFacts[int(kDType)].bytes;
  if constexpr (kDType == DType::kInt8) {
    write_some(y + n, round_any(v), count);
  } else {
    store_lanes<kDType>(y, n, v, count);
  }
}

// Up to kLanes factors of adjacent columns.
template <bool kThere, typename Count>
inline Floats load_factors(const float* factors, int64_t n, Count count, Floats otherwise) {
  return kThere ? load_lanes<DType::kFloat32>(factors, n, count) : otherwise;
}

// A row of sums.
template <DType kDType, bool kPerChannel, bool kBias>
inline void finish_row(const Block& block, const int32_t* sums, const int32_t* excess, int64_t row,
                       int64_t first, int64_t columns) {
  const Output to(block);
  const GemmParams& p = *block.gemm;
  const Floats x_scale = broadcast(block.x_scale[p.x_per_token ? row : 0]);
  const Floats only = broadcast(kPerChannel ? 0.0f : p.w_scale[0]);
  const float* const w_scales = p.w_scale;
  const float* const biases = p.bias;
  const int64_t m = block.first_row + row;
  for_vectors(columns, [&](int64_t i, auto count) {
    const Words sum = read<Words>(sums + i) - read<Words>(excess + i);
    const Floats w_scale = load_factors<kPerChannel>(w_scales, first + i, count, only);
    const Floats bias = load_factors<kBias>(biases, first + i, count, Floats{});
    const Floats v = dequantize<kDType, kBias>(to, bits_as<Ints>(sum), w_scale, x_scale, bias, m,
                                               first + i, count);
    write_output<kDType>(to, v, m, first + i, count);
  });
}

// Calls f(dtype, per_channel, bias) with the kind of the output as types.
template <typename F>
inline void visit_output(const GemmParams& p, const F& f) {
  visit(p.y_dtype, [&](auto type) {
    constexpr std::true_type kYes;
    constexpr std::false_type kNo;
    if (p.w_per_channel) {
      p.bias != nullptr ? f(type, kYes, kYes) : f(type, kYes, kNo);
    } else {
      p.bias != nullptr ? f(type, kNo, kYes) : f(type, kNo, kNo);
    }
    return 0;
  });
}
