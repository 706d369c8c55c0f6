// From the sums of a GEMM to int8 through a gated activation, and the choice between this and
// output.h. Included by the files of the levels only, in an anonymous namespace, after output.h and
// activations.h.
//
// A row's part of a panel is dequantized first, because gate and up must be there together, and
// stays in the L1 cache.

// Channels that are taken at a time: no more than a block of gate has. So a vector may be half of a
// register.
constexpr int64_t kGateLanes = kLanes < kGateBlock ? kLanes : kGateBlock;
using GateFloats = VectorOf<float, kGateLanes>::Type;
using GateInts = VectorOf<int32_t, kGateLanes>::Type;
using GateBytes = VectorOf<int8_t, kGateLanes>::Type;

// As round_any.
inline GateBytes round_gates(GateFloats v) {
  if constexpr (kGateLanes == kLanes) {
    return bits_as<GateBytes>(round_any(bits_as<Floats>(v)));
  } else {
#if defined(__AVX512F__)
    v = v == v ? v : GateFloats{};
    v = v > 127.0f ? GateFloats{} + 127.0f : v;
    v = v < -127.0f ? GateFloats{} - 127.0f : v;
    return bits_as<GateBytes>(
        _mm_cvtsi128_si64(_mm256_cvtepi32_epi8(bits_as<__m256i>(v + 12582912.0f))));
#endif
  }
}

// The nearest value of a type.
inline Floats rounded_to(DType dtype, Floats v) {
  return visit_float(dtype, [&](auto type) {
    constexpr DType kDType = decltype(type)::value;
    if constexpr (kDType == DType::kFloat32) {
      return v;
    } else if constexpr (kDType == DType::kFloat16) {
      return from_float16(to_float16(v));
    } else {
      static_assert(kDType == DType::kBFloat16, "how is a value rounded to this type?");
      return from_bfloat16(to_bfloat16(v));
    }
  });
}

template <bool kPerChannel, bool kBias>
inline void dequantize_gated(const Block& block, const int32_t* sums, const int32_t* excess,
                             int64_t row, int64_t first, int64_t columns, float* product) {
  Output to(block);
  to.residual = nullptr;
  const GemmParams& p = *block.gemm;
  const Floats x_scale = broadcast(block.x_scale[p.x_per_token ? row : 0]);
  const Floats only = broadcast(kPerChannel ? 0.0f : p.w_scale[0]);
  const DType dtype = p.gate_dtype;
  for_vectors(columns, [&](int64_t i, auto count) {
    const Words sum = read<Words>(sums + i) - read<Words>(excess + i);
    const Floats w_scale = load_factors<kPerChannel>(p.w_scale, first + i, count, only);
    const Floats bias = load_factors<kBias>(p.bias, first + i, count, Floats{});
    const Floats v = dequantize<DType::kFloat32, kBias>(to, bits_as<Ints>(sum), w_scale, x_scale,
                                                        bias, 0, 0, count);
    write(product + i, rounded_to(dtype, v));
  });
}

// Rows that are dequantized before their gates are applied: the activations of one row wait for
// each other, those of several do not.
constexpr int64_t kGateRows = 16;
struct GatedProduct {
  alignas(64) float of[kGateRows][kPanel + kLanes];  // a vector may be written beyond the end
};

// One vector of channels: activation(gate) * up, smoothed. `nonfinite`: lanes that have been NaN or
// Inf.
template <Producer kProducer>
inline GateFloats apply_gate(const float* gate, const float* up, const float* inv_smooth,
                             GateInts& nonfinite) {
  GateFloats v = activate<kProducer>(read<GateFloats>(gate)) * read<GateFloats>(up);
  if (inv_smooth != nullptr) v = v * read<GateFloats>(inv_smooth);
  nonfinite |= (bits_as<GateInts>(v) & 0x7fffffff) >= static_cast<int32_t>(kInfinityBits);
  return v;
}

// Tasks share rows, and each that comes here writes the same.
inline void mark_nonfinite(const GateInts& nonfinite, float* y_scale) {
  int64_t found[kGateLanes / 2], any = 0;
  write(found, nonfinite);
  for (int64_t word : found) any |= word;
  if (any == 0) return;
  const auto nan = bits_as<float>(kNanBits);
  __atomic_store(y_scale, &nan, __ATOMIC_RELAXED);
}

// A block of `rows` channels for each token, from its place in the products to y.
template <Producer kProducer>
inline void apply_block(const Block& block, const GatedProduct& product, int64_t at, int64_t m,
                        int64_t tokens, int64_t first, int64_t rows) {
  const GemmParams& p = *block.gemm;
  const float inverse = block.out_inverse;
  float* const y_scale = p.y_scale + m;
  const float* const inv_smooth = p.inv_smooth == nullptr ? nullptr : p.inv_smooth + first + at;
  int8_t* const y = static_cast<int8_t*>(p.y) + m * p.y_stride + first + at;
  const int64_t y_stride = p.y_stride;
  if (rows == kGateBlock) {
    for (int64_t token = 0; token < tokens; ++token) {
      const float* const gate = product.of[token] + 2 * at;
      GateInts nonfinite = {};
      for (int64_t i = 0; i < kGateBlock; i += kGateLanes) {
        const GateFloats v =
            apply_gate<kProducer>(gate + i, gate + kGateBlock + i,
                                  inv_smooth == nullptr ? nullptr : inv_smooth + i, nonfinite);
        write(y + token * y_stride + i, round_gates(v * inverse));
      }
      mark_nonfinite(nonfinite, y_scale + token);
    }
    return;
  }
  float padded[3][kGateBlock] = {};  // gate, up, inv_smooth
  const auto bytes = static_cast<size_t>(rows) * sizeof(float);
  if (inv_smooth != nullptr) std::memcpy(padded[2], inv_smooth, bytes);
  for (int64_t token = 0; token < tokens; ++token) {
    std::memcpy(padded[0], product.of[token] + 2 * at, bytes);
    std::memcpy(padded[1], product.of[token] + 2 * at + rows, bytes);
    int8_t rounded[kGateBlock];
    GateInts nonfinite = {};
    for (int64_t i = 0; i < kGateBlock; i += kGateLanes) {
      const GateFloats v = apply_gate<kProducer>(
          padded[0] + i, padded[1] + i, inv_smooth == nullptr ? nullptr : padded[2] + i, nonfinite);
      write(rounded + i, round_gates(v * inverse));
    }
    std::memcpy(y + token * y_stride, rounded, static_cast<size_t>(rows));
    mark_nonfinite(nonfinite, y_scale + token);
  }
}

// Not inlined, so that there is one of it and not one for each kind of scale and bias.
__attribute__((noinline)) inline void apply_gates(const Block& block, const GatedProduct& product,
                                                  int64_t m, int64_t rows, int64_t first,
                                                  int64_t channels) {
  const auto apply = [&](auto producer) {
    for (int64_t at = 0; at < channels; at += kGateBlock) {
      const int64_t left = channels - at;
      apply_block<decltype(producer)::value>(block, product, at, m, rows, first,
                                             left < kGateBlock ? left : kGateBlock);
    }
  };
  switch (block.gemm->activation) {
    case Producer::kGelu:
      return apply(std::integral_constant<Producer, Producer::kGelu>{});
    case Producer::kGeluTanh:
      return apply(std::integral_constant<Producer, Producer::kGeluTanh>{});
    default:
      return apply(std::integral_constant<Producer, Producer::kSilu>{});
  }
}

// Rows of sums, `stride` apart. `first` is a multiple of 2 kGateBlock.
template <bool kPerChannel, bool kBias>
inline void finish_gated_rows(const Block& block, const int32_t* sums, int64_t stride,
                              const int32_t* excess, int64_t row, int64_t rows, int64_t first,
                              int64_t columns) {
  GatedProduct product;
  for (int64_t done = 0; done < rows; done += kGateRows) {
    const int64_t left = rows - done, count = left < kGateRows ? left : kGateRows;
    for (int64_t i = 0; i < count; ++i) {
      dequantize_gated<kPerChannel, kBias>(block, sums + (done + i) * stride, excess,
                                           row + done + i, first, columns, product.of[i]);
    }
    apply_gates(block, product, block.first_row + row + done, count, first / 2, columns / 2);
  }
}

// Not inlined: the compiler would then stop to inline what runs far more often.
__attribute__((noinline)) inline void finish_rows(const Block& block, const int32_t* sums,
                                                  const int32_t* excess, int64_t first_row,
                                                  int64_t rows, int64_t first, int64_t columns) {
  visit_output(*block.gemm, [&](auto type, auto per_channel, auto bias) {
    constexpr DType kDType = decltype(type)::value;
    constexpr bool kPerChannel = decltype(per_channel)::value, kBias = decltype(bias)::value;
    if constexpr (kDType == DType::kInt8) {
      if (is_gated(*block.gemm)) {
        return finish_gated_rows<kPerChannel, kBias>(block, sums, kPanel, excess, first_row, rows,
                                                     first, columns);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      finish_row<kDType, kPerChannel, kBias>(block, sums + row * kPanel, excess, first_row + row,
                                             first, columns);
    }
  });
}

// Brings the lines of y that `finish_rows` will write into the cache: rows that are far apart would
// miss it one after the other.
inline void prefetch_y(const Block& block, int64_t first_row, int64_t rows, int64_t first,
                       int64_t columns) {
  const GemmParams& p = *block.gemm;
  if (is_gated(p)) first /= 2, columns /= 2;
  constexpr int64_t kLine = 64;
  const int64_t bytes = kDTypeFacts[static_cast<int>(p.y_dtype)].bytes;
  const auto* y =
      static_cast<const char*>(p.y) + (block.first_row + first_row) * p.y_stride * bytes;
  for (int64_t row = 0; row < rows; ++row, y += p.y_stride * bytes) {
    for (int64_t at = first * bytes; at < (first + columns) * bytes; at += kLine) {
      __builtin_prefetch(y + at, 1, 2);
    }
  }
}
