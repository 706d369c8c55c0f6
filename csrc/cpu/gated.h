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

// From the products of the channels [first, first + channels) of row m to y.
template <Producer kProducer>
inline void apply_gates(const Block& block, const float* product, int64_t m, int64_t first,
                        int64_t channels) {
  const GemmParams& p = *block.gemm;
  const float inverse = block.out_inverse;
  GateInts nonfinite = {};
  const auto take = [&](const float* gate, const float* up, const float* inv_smooth) {
    GateFloats v = activate<kProducer>(read<GateFloats>(gate)) * read<GateFloats>(up);
    if (inv_smooth != nullptr) v = v * read<GateFloats>(inv_smooth);
    nonfinite |= (bits_as<GateInts>(v) & 0x7fffffff) >= static_cast<int32_t>(kInfinityBits);
    return round_gates(v * inverse);
  };
  const float* const factors = p.inv_smooth == nullptr ? nullptr : p.inv_smooth + first;
  int8_t* const y = static_cast<int8_t*>(p.y) + m * p.y_stride + first;
  int64_t at = 0;
  for (; at + kGateBlock <= channels; at += kGateBlock) {
    const float* const gate = product + 2 * at;
    for (int64_t i = 0; i < kGateBlock; i += kGateLanes) {
      const float* const inv_smooth = factors == nullptr ? nullptr : factors + at + i;
      write(y + at + i, take(gate + i, gate + kGateBlock + i, inv_smooth));
    }
  }
  if (at < channels) {  // the last block is shorter
    const int64_t rows = channels - at;
    float gate[kGateBlock] = {}, up[kGateBlock] = {}, inv_smooth[kGateBlock] = {};
    int8_t rounded[kGateBlock];
    std::memcpy(gate, product + 2 * at, static_cast<size_t>(rows) * sizeof(float));
    std::memcpy(up, product + 2 * at + rows, static_cast<size_t>(rows) * sizeof(float));
    if (factors != nullptr) {
      std::memcpy(inv_smooth, factors + at, static_cast<size_t>(rows) * sizeof(float));
    }
    for (int64_t i = 0; i < kGateBlock; i += kGateLanes) {
      write(rounded + i, take(gate + i, up + i, factors == nullptr ? nullptr : inv_smooth + i));
    }
    std::memcpy(y + at, rounded, static_cast<size_t>(rows));
  }
  int64_t found[kGateLanes / 2], any = 0;
  write(found, nonfinite);
  for (int64_t word : found) any |= word;
  // Tasks share rows, and each that comes here writes the same.
  if (any != 0) {
    const auto nan = bits_as<float>(kNanBits);
    __atomic_store(p.y_scale + m, &nan, __ATOMIC_RELAXED);
  }
}

// Not inlined, so that there is one of it and not one for each kind of scale and bias.
__attribute__((noinline)) inline void apply_gates(const Block& block, const GatedProduct& product,
                                                  int64_t m, int64_t rows, int64_t first,
                                                  int64_t channels) {
  const auto apply = [&](auto producer) {
    for (int64_t row = 0; row < rows; ++row) {
      apply_gates<decltype(producer)::value>(block, product.of[row], m + row, first, channels);
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
