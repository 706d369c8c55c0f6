// From the sums of a GEMM to int8 through a gated activation, and the choice between this and
// output.h. Included by the files of the levels only, in an anonymous namespace, after output.h and
// activations.h.
//
// A row's part of a panel is dequantized first, because gate and up must be there together, and
// stays in the L1 cache.

// Channels that an activation takes at a time: no more than a block of gate has.
constexpr int64_t kGateLanes = kLanes < kGateBlock ? kLanes : kGateBlock;
using GateFloats = VectorOf<float, kGateLanes>::Type;

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

// Part of a row, in the order of the weight's rows. Its vectors may be read beyond the end.
struct GatedRow {
  alignas(64) float product[kPanel + kLanes];
  alignas(64) float result[kPanel / 2 + kLanes];
};

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

// activation(gate) * up for the `channels` channels of `product`.
template <Producer kProducer>
inline void apply_gates(const float* product, int64_t channels, float* result) {
  for (int64_t block = 0; block < channels; block += kGateBlock) {
    const int64_t left = channels - block, rows = left < kGateBlock ? left : kGateBlock;
    const float* const gate = product + 2 * block;
    for (int64_t i = 0; i < rows; i += kGateLanes) {
      const auto g = activate<kProducer>(read<GateFloats>(gate + i));
      write(result + block + i, g * read<GateFloats>(gate + rows + i));
    }
  }
}

// Not inlined, so that there is one of it and not one for each kind of scale and bias.
__attribute__((noinline)) inline void apply_gates(Producer producer, const float* product,
                                                  int64_t channels, float* result) {
  switch (producer) {
    case Producer::kGelu:
      return apply_gates<Producer::kGelu>(product, channels, result);
    case Producer::kGeluTanh:
      return apply_gates<Producer::kGeluTanh>(product, channels, result);
    default:
      return apply_gates<Producer::kSilu>(product, channels, result);
  }
}

// Smooths and rounds the channels [first, first + channels) of a row of y.
inline void write_gated(const Block& block, const float* result, int64_t m, int64_t first,
                        int64_t channels) {
  const GemmParams& p = *block.gemm;
  const float* const inv_smooth = p.inv_smooth;
  const float inverse = block.out_inverse;
  int8_t* const y = static_cast<int8_t*>(p.y) + m * p.y_stride + first;
  Ints most = {};
  for_vectors(channels, [&](int64_t i, auto count) {
    Floats v = load_lanes<DType::kFloat32>(result, i, count);
    if (inv_smooth != nullptr) v = v * load_lanes<DType::kFloat32>(inv_smooth, first + i, count);
    most = larger(most, bits_as<Ints>(magnitude(v)));
    write_some(y + i, round_any(v * inverse), count);
  });
  // Tasks share rows, and each that comes here writes the same.
  if (largest(most) >= kInfinityBits) {
    const auto nan = bits_as<float>(kNanBits);
    __atomic_store(p.y_scale + m, &nan, __ATOMIC_RELAXED);
  }
}

// A row of sums. `first` is a multiple of 2 kGateBlock.
template <bool kPerChannel, bool kBias>
inline void finish_gated_row(const Block& block, const int32_t* sums, const int32_t* excess,
                             int64_t row, int64_t first, int64_t columns) {
  GatedRow part;
  dequantize_gated<kPerChannel, kBias>(block, sums, excess, row, first, columns, part.product);
  apply_gates(block.gemm->activation, part.product, columns / 2, part.result);
  write_gated(block, part.result, block.first_row + row, first / 2, columns / 2);
}

// Not inlined: the compiler would then stop to inline what runs far more often.
__attribute__((noinline)) inline void finish_rows(const Block& block, const int32_t* sums,
                                                  const int32_t* excess, int64_t first_row,
                                                  int64_t rows, int64_t first, int64_t columns) {
  visit_output(*block.gemm, [&](auto type, auto per_channel, auto bias) {
    constexpr DType kDType = decltype(type)::value;
    constexpr bool kPerChannel = decltype(per_channel)::value, kBias = decltype(bias)::value;
    const auto each_row = [&](auto finish) {
      for (int64_t row = 0; row < rows; ++row) {
        finish(block, sums + row * kPanel, excess, first_row + row, first, columns);
      }
    };
    if constexpr (kDType == DType::kInt8) {
      if (is_gated(*block.gemm)) return each_row(finish_gated_row<kPerChannel, kBias>);
    }
    each_row(finish_row<kDType, kPerChannel, kBias>);
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
