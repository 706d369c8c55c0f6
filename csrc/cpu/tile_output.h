// From the sums of the tile registers to y. Included by level_amx.cpp only, in an anonymous
// namespace, after interleaved.h.

constexpr int64_t kTileRows = 16;  // rows of the weight, or tokens
constexpr int kTilesWide = 2;      // of the weight, and of the activations, at a time
constexpr int kCornerTiles = kTilesWide * kTilesWide;

// The tiles of a corner of y, each [columns, tokens], those of the first 16 columns first.
struct TileSums {
  alignas(64) int32_t of[kCornerTiles][kTileRows][kTileRows];
};
struct TileCorner {
  const TileSums* sums;
  int64_t row, rows;  // of the block
  int64_t first, columns;
};

// Writes one tile. kStream: past the caches, to lines of 64 bytes.
template <DType kDType, bool kPerChannel, bool kBias, bool kStream>
inline void finish_tile(const Block& block, const TileCorner& corner, int tile) {
  const int64_t row = corner.row + tile % kTilesWide * kTileRows;
  const int64_t rows = corner.row + corner.rows - row;
  const int64_t n = corner.first + tile / kTilesWide * kTileRows;
  const int64_t columns = corner.first + corner.columns - n;
  if (rows <= 0 || columns <= 0) return;
  const auto column = [&](int i) { return _mm512_load_si512(corner.sums->of[tile][i]); };
  __m512i tokens[kTileRows];
  transpose(column, tokens);

  const GemmParams& p = *block.gemm;
  const bool gated = kDType == DType::kInt8 && is_gated(p);
  if (rows < kTileRows || columns < kTileRows || p.residual != nullptr || gated) {
    alignas(64) static constexpr int32_t kNoExcess[kTileRows] = {};
    alignas(64) int32_t sums[kTileRows][kTileRows];
    for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(sums[i], tokens[i]);
    const int64_t some = columns < kTileRows ? columns : kTileRows;
    if constexpr (kDType == DType::kInt8) {
      static_assert(kTileRows == 2 * kGateBlock);
      if (gated) {
        const int64_t count = rows < kTileRows ? rows : kTileRows;
        return finish_gated_rows<kPerChannel, kBias>(block, sums[0], kTileRows, kNoExcess, row,
                                                     count, n, some);
      }
    }
    for (int i = 0; i < kTileRows && i < rows; ++i) {
      finish_row<kDType, kPerChannel, kBias>(block, sums[i], kNoExcess, row + i, n, some);
    }
    return;
  }
  // The usual case stays in registers.
  Output to(block);
  to.residual = nullptr;
  constexpr std::integral_constant<int64_t, kLanes> kAll;
  const float* const x_scales = block.x_scale + (p.x_per_token ? row : 0);
  const int64_t x_step = p.x_per_token;
  const int64_t m = block.first_row + row;
  const Floats only = broadcast(kPerChannel ? 0.0f : *p.w_scale);
  const Floats w_scale = load_factors<kPerChannel>(p.w_scale, n, kAll, only);
  const Floats bias = load_factors<kBias>(p.bias, n, kAll, Floats{});
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    const Floats v =
        dequantize<kDType, kBias>(to, bits_as<Ints>(tokens[i]), w_scale,
                                  broadcast(x_scales[i * x_step]), bias, m + i, n, kAll);
    if constexpr (kStream) {
      _mm512_stream_ps(static_cast<float*>(to.y) + (m + i) * to.y_stride + n, bits_as<__m512>(v));
    } else {
      write_output<kDType>(to, v, m + i, n, kAll);
    }
  }
}

// A y of more bytes than this many L2 caches goes past the caches: it would leave all of them
// before it is read again. Measured with a reader after the GEMM, on Sapphire Rapids with 2 MiB of
// L2: 6 MB of float32 then take 1.35 times as long, 11 MB as long, 25 MB half.
constexpr int64_t kStreamCaches = 8;

inline bool is_streamed(const GemmParams& p) {
  const auto address = reinterpret_cast<uintptr_t>(p.y);
  return p.y_dtype == DType::kFloat32 && address % 64 == 0 && p.y_stride % kTileRows == 0 &&
         p.m * p.n * int64_t{sizeof(float)} > kStreamCaches * l2_bytes();
}

// Writes a corner to y while the next one is multiplied: the tile unit and the vectors then work at
// the same time. A call is one tile, few enough instructions for the processor to look beyond them.
class TileFinisher {
 public:
  explicit TileFinisher(const Block& block) : block_(block), streams_(is_streamed(*block.gemm)) {
    visit_output(*block.gemm, [&](auto type, auto per_channel, auto bias) {
      constexpr DType kDType = decltype(type)::value;
      constexpr bool kPerChannel = decltype(per_channel)::value, kBias = decltype(bias)::value;
      finish_ = &finish_tile<kDType, kPerChannel, kBias, false>;
      if constexpr (kDType == DType::kFloat32) {
        if (streams_) finish_ = &finish_tile<kDType, kPerChannel, kBias, true>;
      }
    });
  }

  // The corner's sums may be overwritten only after `finish`.
  void start(const TileCorner& corner) {
    finish();
    corner_ = corner;
    done_ = 0;
  }
  void one_tile() {
    if (done_ < kCornerTiles) finish_(block_, corner_, done_++);
  }
  void finish() {
    while (done_ < kCornerTiles) one_tile();
  }
  // After the last corner: other threads see y then.
  void end() {
    finish();
    if (streams_) _mm_sfence();
  }
  bool streams() const { return streams_; }

 private:
  const Block& block_;
  const bool streams_;
  void (*finish_)(const Block&, const TileCorner&, int) = nullptr;
  TileCorner corner_ = {};
  int done_ = kCornerTiles;
};
