// The GEMM of many rows by 8-bit dot products. Included by level_avx512_vnni.cpp only, in an
// anonymous namespace, after interleaved.h and w4.h.
//
// Adding up lanes costs as much for a short k as for a long one. With many rows it is cheaper to
// pack a panel of the weight as well, so that each lane is a column, and the panel serves all rows.

// Measured on Sapphire Rapids: at k = 576 the gain is 11 % for 64 rows and 28 % for 256, at k =
// 1,536 it is -4 and 7 %, at k = 4,096 it is -12 and 8 %, and at k = 11,008 there is none.
inline bool is_wide(int64_t rows, int64_t k) {
  return k <= 2048 ? rows >= 48 && 20 * rows >= k : k <= 4096 && rows >= 192;
}

constexpr int kWideRows = 8, kWideVectors = kPanel / 16;

// Channels of a panel: it is on the stack, which may be short in a thread.
constexpr int64_t kWideDepth = 1024;

// 4 channels of all columns, then the next 4.
struct WidePanel {
  alignas(64) uint8_t of[kWideDepth * kPanel];
};

// Packs `depth` channels of up to kPanel columns, and adds kX times their sums to `excess`. All
// start at `first` and at `channel`, a multiple of kWideDepth.
template <bool kW4>
inline void pack_panel(const GemmParams& p, int64_t first, int64_t columns, int64_t channel,
                       int64_t depth, WidePanel& panel, int32_t* excess) {
  for (int64_t vector = 0; vector < kWideVectors; ++vector) {
    __m512i sums = _mm512_loadu_si512(excess + 16 * vector);
    for (int64_t at = 0; at < depth; at += kPackedStep) {
      const int64_t left = depth - at;
      const __mmask64 mask = left < kPackedStep ? (__mmask64{1} << left) - 1 : ~__mmask64{0};
      __m512i channels[16];
      const auto row = [&](int64_t i) {
        const int64_t n = 16 * vector + i;
        const __mmask64 own = n < columns ? mask : 0;
        const int64_t column = first + (n < columns ? n : 0), begin = channel + at;
        const int8_t* const w = p.w_q + column * p.w_q_stride;
        if constexpr (kW4) {
          const int64_t group = begin / kW4Group;
          const auto* const values = reinterpret_cast<const uint8_t*>(w) + group * kW4Bytes;
          return _mm512_maskz_mov_epi8(
              own, Nibbles::weights(Nibbles::read(values), group_of(p, group, column),
                                    begin % kW4Group != 0));
        } else {
          return _mm512_maskz_loadu_epi8(own, w + begin);
        }
      };
      transpose(row, channels);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_store_si512(panel.of + (at + kFour * i) * kPanel + 64 * vector, channels[i]);
        sums = Dot::ones_dot(sums, channels[i]);
      }
    }
    _mm512_storeu_si512(excess + 16 * vector, sums);
  }
}

// kWideRows rows and a panel. `x`: 4 channels of 16 rows, then the next 4.
inline void multiply_wide(const uint8_t* x, const WidePanel& panel, int64_t depth, int32_t* sums,
                          bool add) {
  __m512i acc[kWideRows][kWideVectors];
  for (int r = 0; r < kWideRows; ++r) {
    for (int j = 0; j < kWideVectors; ++j) {
      acc[r][j] = add ? _mm512_loadu_si512(sums + r * kPanel + 16 * j) : _mm512_setzero_si512();
    }
  }
  const uint8_t* w = panel.of;
  for (int64_t at = 0; at < depth; at += kFour, x += kFour * kGroup, w += kFour * kPanel) {
    __m512i columns[kWideVectors];
    for (int j = 0; j < kWideVectors; ++j) columns[j] = _mm512_load_si512(w + 64 * j);
    for (int r = 0; r < kWideRows; ++r) {
      const __m512i row = _mm512_set1_epi32(read<int32_t>(x + kFour * r));
      for (int j = 0; j < kWideVectors; ++j) acc[r][j] = Dot::dot(acc[r][j], row, columns[j]);
    }
  }
  for (int r = 0; r < kWideRows; ++r) {
    for (int j = 0; j < kWideVectors; ++j) {
      _mm512_storeu_si512(sums + r * kPanel + 16 * j, acc[r][j]);
    }
  }
}

// Brings one of `parts` equal parts of `rows` rows of the weight into the L2 cache.
inline void prefetch_part(const int8_t* w, int64_t stride, int64_t rows, int64_t depth,
                          int64_t part, int64_t parts) {
  const int64_t lines = divide_up(depth, kPackedStep), all = rows * lines;
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    __builtin_prefetch(w + i / lines * stride + i % lines * kPackedStep, 0, 2);
  }
}

template <bool kW4>
inline void multiply_wide_panels(const Block& block) {
  const GemmParams& p = *block.gemm;
  constexpr int64_t kChannels = kW4 ? 2 : 1;  // of a byte of the weight
  Sums sums;
  WidePanel panel;
  const int64_t parts = divide_up(block.rows, int64_t{kWideRows});
  for (int64_t first = block.first_column; first < block.last_column; first += kPanel) {
    const int64_t left = block.last_column - first, columns = left < kPanel ? left : kPanel;
    const int64_t after = left - columns < kPanel ? left - columns : kPanel;
    const int8_t* w = p.w_q + first * p.w_q_stride;
    std::memset(sums.excess, 0, sizeof sums.excess);
    for (int64_t done = 0; done < p.k; done += kWideDepth) {
      const int64_t depth = p.k - done < kWideDepth ? p.k - done : kWideDepth;
      pack_panel<kW4>(p, first, columns, done, depth, panel, sums.excess);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t row = part * kWideRows;
        const int64_t rest = block.rows - row;
        if (done == 0) prefetch_y(block, row, rest < kWideRows ? rest : kWideRows, first, columns);
        prefetch_part(w + kPanel * p.w_q_stride + done / kChannels, p.w_q_stride, after,
                      depth / kChannels, part, parts);
        multiply_wide(
            block.x + row / kGroup * group_bytes(p.k) + done * kGroup + row % kGroup * kFour, panel,
            depth, sums.of + row * kPanel, done > 0);
      }
    }
    finish_rows(block, sums.of, sums.excess, 0, block.rows, first, columns);
  }
}

inline void multiply_wide_block(const Block& block) {
  (is_w4(*block.gemm) ? multiply_wide_panels<true> : multiply_wide_panels<false>)(block);
}
