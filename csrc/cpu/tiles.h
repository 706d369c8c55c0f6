// The GEMM of a block of packed rows on the tile registers. Included by level_amx.cpp only, in an
// anonymous namespace, after tile_output.h and w4.h.

constexpr int64_t kTileBytes = 64;  // channels of a tile
constexpr int64_t kTileColumns = kTilesWide * kTileRows;
static_assert(kTileColumns <= kPanel);

// A tile takes as long for one token as for 16.
inline bool is_for_tiles(int64_t rows, int64_t) { return rows >= 8; }

// The shapes of the 8 tile registers: 0 to 3 sums, 4 and 5 the weight, 6 and 7 activations.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Rows of the weight in its first and its second tile.
  TileShapes(int64_t first, int64_t second) {
    const auto set = [&](int tile, int64_t count) {
      row_bytes[tile] = kTileBytes;
      rows[tile] = static_cast<uint8_t>(count);
    };
    set(0, first);
    set(1, first);
    set(4, first);
    if (second > 0) {
      set(2, second);
      set(3, second);
      set(5, second);
    }
    set(6, kTileRows);
    set(7, kTileRows);
    __asm__ volatile("" ::: "memory");
  }
};

// The weight's last channels, fewer than 64, with zeros after them.
struct WeightTail {
  alignas(64) int8_t of[kTileColumns * kTileBytes];

  WeightTail(const int8_t* w, int64_t stride, int64_t rows, int64_t k) {
    const int64_t at = k / kTileBytes * kTileBytes;
    std::memset(of, 0, sizeof of);
    for (int64_t row = 0; at < k && row < rows; ++row) {
      std::memcpy(of + row * kTileBytes, w + row * stride + at, static_cast<size_t>(k - at));
    }
    __asm__ volatile("" ::: "memory");  // the compiler does not see that tile loads read this
  }
};

// What a corner reads.
struct TileOperands {
  const int8_t* w;
  int64_t w_stride;
  const WeightTail* tail;
  const uint8_t* x;
  int64_t x_group;      // bytes from a group of rows to the next
  int64_t k;            // channels
  const int8_t* ahead;  // rows of the weight to bring into the L2 cache meanwhile
  bool add;             // to the sums of other channels
};

// kWeights x kTokens tiles of sums over o.k channels, in registers, then in `sums`, once the
// finisher has read those before. kAhead: how many rows it prefetches.
template <int kWeights, int kTokens, int kAhead>
inline void multiply_tile_corner(const TileOperands& o, TileSums& sums, TileFinisher& finisher) {
  constexpr bool kAll = kWeights > 1 && kTokens > 1;
  if (o.add) {
    _tile_loadd(0, sums.of[0], 64);
    if constexpr (kTokens > 1) _tile_loadd(1, sums.of[1], 64);
    if constexpr (kWeights > 1) _tile_loadd(2, sums.of[2], 64);
    if constexpr (kAll) _tile_loadd(3, sums.of[3], 64);
  } else {
    _tile_zero(0);
    if constexpr (kTokens > 1) _tile_zero(1);
    if constexpr (kWeights > 1) _tile_zero(2);
    if constexpr (kAll) _tile_zero(3);
  }
  const uint8_t* const x_next = o.x + o.x_group;
  const auto step = [&](const int8_t* weight, int64_t stride, int64_t at) {
    _tile_loadd(6, o.x + at * kTileRows, 64);
    _tile_loadd(4, weight, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kTokens > 1) {
      _tile_loadd(7, x_next + at * kTileRows, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kWeights > 1) {
      _tile_loadd(5, weight + kTileRows * stride, stride);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kAll) _tile_dpbssd(3, 5, 7);
  };
  int64_t at = 0;
  for (; at + kTileBytes <= o.k; at += kTileBytes) {
    step(o.w + at, o.w_stride, at);
    if (at % (2 * kTileBytes) == 0) finisher.one_tile();
    for (int i = 0; i < kAhead; ++i) __builtin_prefetch(o.ahead + i * o.w_stride + at, 0, 2);
  }
  if (at < o.k) step(o.tail->of, kTileBytes, at);
  finisher.finish();

  _tile_stored(0, sums.of[0], 64);
  if constexpr (kTokens > 1) _tile_stored(1, sums.of[1], 64);
  if constexpr (kWeights > 1) _tile_stored(2, sums.of[2], 64);
  if constexpr (kAll) _tile_stored(3, sums.of[3], 64);
}

// All rows of a block and up to 32 columns. `prefetch`: another 32 follow.
template <int kWeights>
inline void multiply_tile_columns(const Block& block, const int8_t* w, int64_t first,
                                  int64_t columns, bool prefetch, TileSums& sums,
                                  TileFinisher& finisher) {
  const GemmParams& p = *block.gemm;
  const WeightTail tail(w, p.w_q_stride, columns, p.k);
  const bool alone = block.rows <= 2 * kTileRows;
  for (int64_t row = 0; row < block.rows; row += 2 * kTileRows) {
    const int64_t left = block.rows - row, rows = left < 2 * kTileRows ? left : 2 * kTileRows;
    const int64_t index = row / (2 * kTileRows);
    if (!finisher.streams()) prefetch_y(block, row, rows, first, columns);
    const auto corner = [&](auto tokens, auto ahead) {
      constexpr int kAhead = decltype(ahead)::value;
      const int64_t x_group = group_bytes(p.k);
      const TileOperands operands = {w,
                                     p.w_q_stride,
                                     &tail,
                                     block.x + row / kGroup * x_group,
                                     x_group,
                                     p.k,
                                     w + (kTileColumns + index * kAhead) * p.w_q_stride,
                                     false};
      multiply_tile_corner<kWeights, decltype(tokens)::value, kAhead>(operands, sums, finisher);
    };
    // The corners of these columns share the prefetch of the next ones.
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, 2> kTwo;
    constexpr std::integral_constant<int, 0> kNone;
    constexpr std::integral_constant<int, 8> kPart;
    constexpr std::integral_constant<int, kTileColumns> kAll;
    if (rows <= kTileRows) {
      alone&& prefetch ? corner(kOne, kAll) : corner(kOne, kNone);
    } else if (alone) {
      prefetch ? corner(kTwo, kAll) : corner(kTwo, kNone);
    } else {
      prefetch && (index + 1) * kPart <= kTileColumns ? corner(kTwo, kPart) : corner(kTwo, kNone);
    }
    finisher.start({&sums, row, rows, first, columns});
  }
}

// Channels of a weight of 4 bits that are unpacked for all rows of a block, before the next ones.
constexpr int64_t kUnpackedTileDepth = 2048;

// The same for a weight of 4 bits. All corners of these columns keep their sums meanwhile.
struct UnpackedTiles {
  Unpacked<kTileColumns, kUnpackedTileDepth> w;
  TileSums sums[kMostRows / (2 * kTileRows)];
};

template <int kWeights>
inline void multiply_unpacked_tile_columns(const Block& block, int64_t first, int64_t columns,
                                           UnpackedTiles& tiles, TileFinisher& finisher) {
  const GemmParams& p = *block.gemm;
  const int64_t x_group = group_bytes(p.k);
  for (int64_t done = 0; done < p.k; done += kUnpackedTileDepth) {
    const int64_t rest = p.k - done, depth = rest < kUnpackedTileDepth ? rest : kUnpackedTileDepth;
    // Nor does the compiler see that tile loads read `w`, before this and after WeightTail.
    __asm__ volatile("" ::: "memory");
    tiles.w.fill<Nibbles>(p, first, columns, done, depth);
    const WeightTail tail(tiles.w.of, tiles.w.kStride, columns, depth);
    for (int64_t row = 0; row < block.rows; row += 2 * kTileRows) {
      const int64_t left = block.rows - row, rows = left < 2 * kTileRows ? left : 2 * kTileRows;
      TileSums& sums = tiles.sums[row / (2 * kTileRows)];
      if (done == 0 && !finisher.streams()) prefetch_y(block, row, rows, first, columns);
      const TileOperands operands = {
          tiles.w.of, tiles.w.kStride, &tail,   block.x + row / kGroup * x_group + done * kTileRows,
          x_group,    depth,           nullptr, done > 0};
      if (rows <= kTileRows) {
        multiply_tile_corner<kWeights, 1, 0>(operands, sums, finisher);
      } else {
        multiply_tile_corner<kWeights, 2, 0>(operands, sums, finisher);
      }
      if (rest <= kUnpackedTileDepth) finisher.start({&sums, row, rows, first, columns});
    }
  }
}

// Calls f(weights, first, columns, prefetch) for the columns of a block, 32 at a time. `weights`:
// how many tiles hold them. The tile registers are configured then.
template <typename F>
inline void for_tile_columns(const Block& block, const F& f) {
  int64_t configured = -1;
  for (int64_t first = block.first_column; first < block.last_column; first += kTileColumns) {
    const int64_t left = block.last_column - first;
    const int64_t columns = left < kTileColumns ? left : kTileColumns;
    const int64_t second = columns > kTileRows ? columns - kTileRows : 0;
    const bool prefetch = left >= 2 * kTileColumns;
    if (columns != configured) {
      const TileShapes shapes(columns - second, second);
      _tile_loadconfig(&shapes);
      configured = columns;
    }
    if (second > 0) {
      f(std::integral_constant<int, 2>{}, first, columns, prefetch);
    } else {
      f(std::integral_constant<int, 1>{}, first, columns, prefetch);
    }
  }
}

inline void multiply_tiles(const Block& block) {
  const GemmParams& p = *block.gemm;
  TileFinisher finisher(block);
  if (is_w4(p)) {
    UnpackedTiles tiles;
    for_tile_columns(block, [&](auto weights, int64_t first, int64_t columns, bool) {
      multiply_unpacked_tile_columns<decltype(weights)::value>(block, first, columns, tiles,
                                                               finisher);
    });
    finisher.end();
  } else {
    TileSums sums;
    for_tile_columns(block, [&](auto weights, int64_t first, int64_t columns, bool prefetch) {
      const int8_t* w = p.w_q + first * p.w_q_stride;
      multiply_tile_columns<decltype(weights)::value>(block, w, first, columns, prefetch, sums,
                                                      finisher);
    });
    finisher.end();
  }
  _tile_release();
}
