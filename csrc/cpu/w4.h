// The GEMM with a weight of 4 bits, whose groups of kW4Group channels have a step and an offset.
// Included by the files of the levels only, in an anonymous namespace, after panels.h and a struct
// Nibbles:
//
//   kMostRowsInPlace   for blocks of more rows the weight is unpacked first
//   kRows              rows of the largest micro-kernel
//   kStepTwice         a step is in both halves of its word, and not only in the low one
//   Values             the values 0 to 15 of a group of a row, in the order of its bytes: 64 from
//                      the low halves, 64 from the high ones
//   Step               a step in all lanes
//   read(const uint8_t*)
//   read_step(const int32_t*)
//   add(Dot::Sum, const int8_t* x, Values, Step)   adds step times the products of a group
//   unpack(const uint8_t*, const int8_t* group, int8_t* to)   writes the int8 weights of a group,
//                      whose step and offset are at `group`; only for levels that unpack
//
// With few rows the values are never unpacked: a group adds
//
//   step * (sum of x * value) + offset * (sum of x)
//
// to the sum of a column. The activations are packed in the order in which the values come, and
// with them their sums over the groups. All partial sums of a group fit 16 bits: at most
// kW4Group / 8 * 15 * 128 in any lane, and 128 * 128 for the sum of x. Sums of groups wrap around
// like those of shifted activations (panels.h), and what they add up to fits.

// --- packed rows ---------------------------------------------------------------------------------

// A row is its groups, and then their sums, two int16 in a word, the first in the low half.
inline int64_t nibble_sums(int64_t k) { return w4_groups(k) * kW4Group; }
inline int64_t nibble_row(int64_t k) {
  return nibble_sums(k) + round_up(w4_groups(k) * 2, kVector);
}

// Packs a group, and returns its sum. Byte 16 t + 4 i + j of the weight has channel 32 i + 4 t + j
// in its low half and channel 32 i + 16 + 4 t + j in its high half.
inline int32_t pack_group(const int8_t* x, int8_t* to) {
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(to + 16 * t + 4 * i, x + 32 * i + 4 * t, 4);
      std::memcpy(to + 64 + 16 * t + 4 * i, x + 32 * i + 16 + 4 * t, 4);
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < kW4Group; ++i) sum += x[i];
  return sum;
}

// Missing channels become 0, because the weight may hold anything there.
inline void pack_for_nibbles(const int8_t* x_q, int64_t stride, int64_t rows, int64_t k,
                             uint8_t* packed) {
  const int64_t length = nibble_row(k), whole = k / kW4Group;
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* from = x_q + row * stride;
    auto* const to = reinterpret_cast<int8_t*>(packed + row * length);
    auto* const sums = reinterpret_cast<uint32_t*>(to + nibble_sums(k));
    std::memset(sums, 0, static_cast<size_t>(length - nibble_sums(k)));
    const auto add_group = [&](int64_t g, const int8_t* x) {
      const auto sum = static_cast<uint16_t>(pack_group(x, to + g * kW4Group));
      sums[g / 2] |= uint32_t{sum} << (g % 2 * 16);
    };
    for (int64_t g = 0; g < whole; ++g) add_group(g, from + g * kW4Group);
    if (whole < w4_groups(k)) {
      int8_t last[kW4Group] = {};
      std::memcpy(last, from + whole * kW4Group, static_cast<size_t>(k - whole * kW4Group));
      add_group(whole, last);
    }
  }
}

// --- the values in place -------------------------------------------------------------------------

// Columns of a micro-kernel: with one or two rows the memory sets the pace, and four columns keep
// more of it busy.
constexpr int nibble_columns(int rows) { return rows <= 2 ? 4 : 2; }
constexpr int64_t kNibbleColumns = nibble_columns(1);
static_assert(kPanel % kNibbleColumns == 0);
// Groups whose steps are read at a time: all of a usual k if the block has few rows. Otherwise as
// many as keep a panel of the weight in the L2 cache and the rows of a micro-kernel in the L1
// cache.
constexpr int64_t kMostGroups = 128, kGroupsOfMany = kDepth / kW4Group;
static_assert(kMostGroups % 2 == 0 && kGroupsOfMany % 2 == 0 && kGroupsOfMany <= kMostGroups);

// The steps and offsets of a panel. In w_group those of a column are far apart, often at multiples
// of a power of two, which share few lines of a cache.
struct GroupPanel {
  alignas(64) int32_t steps[kMostGroups][kPanel];
  alignas(64) int32_t offsets[kMostGroups / 2][kPanel];  // those of two groups, as int16
};

inline const int8_t* group_of(const GemmParams& p, int64_t group, int64_t column) {
  return p.w_group + (group * p.n + column) * 2;
}

// Reads `groups` groups from `group` on. Vectors are filled with zeros.
inline void read_groups(const GemmParams& p, int64_t group, int64_t groups, int64_t first,
                        int64_t columns, GroupPanel& panel) {
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* const from = group_of(p, group + g, first);
    for_vectors(columns, [&](int64_t i, auto count) {
      using Pairs = VectorOf<int8_t, 2 * kLanes>::Type;
      Pairs bytes;
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        bytes = read_some<Pairs>(from + 2 * i, 2 * count);
      } else {
        bytes = read<Pairs>(from + 2 * i);
      }
      const Ints pairs = __builtin_convertvector(bits_as<Shorts>(bytes), Ints);
      constexpr bool kLittle = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
      const Ints step = kLittle ? pairs & 0xff : pairs >> 8;
      const Ints offset = kLittle ? (pairs << 16) >> 24 : (pairs << 24) >> 24;
      write(panel.steps[g] + i, Nibbles::kStepTwice ? step | step << 16 : step);
      int32_t* const two = panel.offsets[g / 2] + i;
      write(two, g % 2 == 0 ? offset & 0xffff : read<Ints>(two) | offset << 16);
    });
  }
}

// Brings some groups of a panel into the L2 cache.
inline void prefetch_groups(const GemmParams& p, int64_t group, int64_t last, int64_t column) {
  constexpr int64_t kLine = 64, kBytes = 2 * kPanel;
  for (; group < last; ++group) {
    const int8_t* const at = group_of(p, group, column);
    for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(at + i, 0, 2);
  }
}

// The sum of the products of two int16 in each lane.
inline Words dot_pairs(Ints a, int32_t b) {
#if defined(__AVX512BW__)
  return bits_as<Words>(_mm512_madd_epi16(bits_as<__m512i>(a), _mm512_set1_epi32(b)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_madd_epi16(bits_as<__m256i>(a), _mm256_set1_epi32(b)));
#else
  const int32_t low = static_cast<int16_t>(b), high = b >> 16;
  return bits_as<Words>(((a << 16) >> 16) * low) + bits_as<Words>((a >> 16) * high);
#endif
}

// What the offsets of some groups contribute to a row of sums. `sums_of_x`: of the first group.
inline void add_offsets(const GroupPanel& panel, int64_t groups, const int32_t* sums_of_x,
                        int64_t columns, bool add, int32_t* sums) {
  constexpr int64_t kAtOnce = 3;
  static_assert(kPanel % (kAtOnce * kLanes) == 0);
  for (int64_t i = 0; i < columns; i += kAtOnce * kLanes) {
    Words acc[kAtOnce] = {};
    for (int64_t pair = 0; pair < divide_up(groups, int64_t{2}); ++pair) {
      for (int64_t j = 0; j < kAtOnce; ++j) {
        acc[j] += dot_pairs(read<Ints>(panel.offsets[pair] + i + j * kLanes), sums_of_x[pair]);
      }
    }
    for (int64_t j = 0; j < kAtOnce; ++j) {
      int32_t* const to = sums + i + j * kLanes;
      write(to, add ? read<Words>(to) + acc[j] : acc[j]);
    }
  }
}

// What a micro-kernel reads, all at the same group.
struct NibbleCorner {
  const int8_t* x;
  int64_t x_stride;
  const uint8_t* w;
  int64_t w_stride;
  const int32_t* steps;  // of the first column
  int64_t groups;
  const uint8_t* ahead;  // rows of the weight to bring into the L2 cache meanwhile
};

// Adds kRows x kColumns sums over c.groups groups.
template <int kRows, int kColumns, bool kAhead>
inline void multiply_nibble_corner(const NibbleCorner& c, int32_t* sums) {
  Dot::Sum acc[kRows][kColumns] = {};
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int n = 0; n < kColumns; ++n) {
      const int64_t at = n * c.w_stride + g * kW4Bytes;
      const typename Nibbles::Values values = Nibbles::read(c.w + at);
      const typename Nibbles::Step step = Nibbles::read_step(c.steps + g * kPanel + n);
      if constexpr (kAhead) __builtin_prefetch(c.ahead + at, 0, 2);
      for (int r = 0; r < kRows; ++r) {
        acc[r][n] = Nibbles::add(acc[r][n], c.x + r * c.x_stride + g * kW4Group, values, step);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    int32_t totals[kColumns + 4];
    Dot::totals<kColumns>(acc[r], totals);
    for (int n = 0; n < kColumns; ++n) {
      int32_t& to = sums[r * kPanel + n];
      to = static_cast<int32_t>(static_cast<uint32_t>(to) + static_cast<uint32_t>(totals[n]));
    }
  }
}

// Up to kRows rows, and all columns of a panel. `between` is called before some columns,
// with the first and the end of them.
template <int kRows, typename F>
inline void multiply_nibble_columns(int64_t rows, NibbleCorner c, int64_t columns, int64_t left,
                                    int32_t* sums, const F& between) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_nibble_columns<kRows - 1>(rows, c, columns, left, sums, between);
    }
  }
  constexpr int kColumns = nibble_columns(kRows);
  const int64_t ahead = divide_up(kAheadBytes, kColumns * kW4Bytes * c.groups);
  c.ahead = c.w + ahead * kColumns * c.w_stride;
  int64_t n = 0;
  for (; n + kColumns <= columns; n += kColumns) {
    between(n, n + kColumns);
    if (n + (ahead + 1) * kColumns <= left) {
      multiply_nibble_corner<kRows, kColumns, true>(c, sums + n);
    } else {
      multiply_nibble_corner<kRows, kColumns, false>(c, sums + n);
    }
    c.w += kColumns * c.w_stride;
    c.ahead += kColumns * c.w_stride;
    c.steps += kColumns;
  }
  for (; n < columns; ++n, c.w += c.w_stride, ++c.steps) {
    multiply_nibble_corner<kRows, 1, false>(c, sums + n);
  }
}

inline void multiply_nibbles(const Block& block) {
  const GemmParams& p = *block.gemm;
  Sums sums;
  GroupPanel panel;
  std::memset(sums.excess, 0, sizeof sums.excess);
  const int64_t all = w4_groups(p.k), length = nibble_row(p.k);
  const int64_t most = block.rows <= Nibbles::kRows ? kMostGroups : kGroupsOfMany;
  NibbleCorner c = {};
  c.x_stride = length;
  c.w_stride = p.w_q_stride;
  c.steps = panel.steps[0];
  for (int64_t first = block.first_column; first < block.last_column; first += kPanel) {
    const int64_t left = block.last_column - first, columns = left < kPanel ? left : kPanel;
    for (int64_t done = 0; done < all; done += most) {
      c.groups = all - done < most ? all - done : most;
      c.w = reinterpret_cast<const uint8_t*>(p.w_q) + first * p.w_q_stride + done * kW4Bytes;
      read_groups(p, done, c.groups, first, columns, panel);
      const auto row_of_x = [&](int64_t row) { return block.x + row * length; };
      for (int64_t row = 0; row < block.rows; ++row) {
        const auto* const sums_of_x =
            reinterpret_cast<const int32_t*>(row_of_x(row) + nibble_sums(p.k));
        add_offsets(panel, c.groups, sums_of_x + done / 2, columns, done > 0,
                    sums.of + row * kPanel);
      }
      for (int64_t row = 0; row < block.rows; row += Nibbles::kRows) {
        // The next panel's steps and offsets come with the columns of this one.
        const auto between = [&](int64_t n, int64_t end) {
          if (row > 0 || left < 2 * kPanel) return;
          prefetch_groups(p, done + c.groups * n / kPanel, done + c.groups * end / kPanel,
                          first + kPanel);
        };
        c.x = reinterpret_cast<const int8_t*>(row_of_x(row)) + done * kW4Group;
        multiply_nibble_columns<Nibbles::kRows>(block.rows - row, c, columns, left,
                                                sums.of + row * kPanel, between);
      }
    }
    finish_rows(block, sums.of, sums.excess, 0, block.rows, first, columns);
  }
}

// --- the unpacked weight -------------------------------------------------------------------------

// Some channels of some rows of the weight. The stride is such that rows do not share the lines of
// a cache.
template <int64_t kRows, int64_t kChannels>
struct Unpacked {
  static_assert(kChannels % kW4Group == 0);
  static constexpr int64_t kStride = kChannels + kVector;
  alignas(64) int8_t of[kRows * kStride];

  // `rows` rows from `first` on, and `depth` channels from `channel` on, a multiple of kW4Group.
  // The rest of the last group is written as well.
  template <typename Level>
  void fill(const GemmParams& p, int64_t first, int64_t rows, int64_t channel, int64_t depth) {
    const int64_t begin = channel / kW4Group, end = begin + w4_groups(depth);
    const auto* w = reinterpret_cast<const uint8_t*>(p.w_q) + first * p.w_q_stride;
    for (int64_t row = 0; row < rows; ++row, w += p.w_q_stride) {
      for (int64_t g = begin; g < end; ++g) {
        Level::unpack(w + g * kW4Bytes, group_of(p, g, first + row),
                      of + row * kStride + (g - begin) * kW4Group);
      }
    }
  }
};

template <typename Level, int kColumns>
inline void multiply_unpacked_columns(const Block& block, int64_t first,
                                      Unpacked<Dot::kColumns, kDepth>& w, int32_t* sums,
                                      int32_t* excess) {
  const GemmParams& p = *block.gemm;
  Corner c = {};
  c.x_stride = packed_row(p.k);
  c.w = c.ahead = w.of;
  c.w_stride = w.kStride;
  for (int64_t done = 0; done < p.k; done += kDepth) {
    c.x = reinterpret_cast<const Dot::X*>(block.x) + done;
    c.depth = p.k - done < kDepth ? p.k - done : kDepth;
    w.template fill<Level>(p, first, kColumns, done, c.depth);
    multiply_depth<kColumns>(block.rows, c, false, done > 0, sums, excess);
  }
}

// As multiply_rows, with an unpacked weight.
template <typename Level>
inline void multiply_unpacked(const Block& block) {
  Sums sums;
  Unpacked<Dot::kColumns, kDepth> w;
  for (int64_t first = block.first_column; first < block.last_column; first += kPanel) {
    const int64_t left = block.last_column - first, columns = left < kPanel ? left : kPanel;
    int64_t n = 0;
    for (; n + Dot::kColumns <= columns; n += Dot::kColumns) {
      multiply_unpacked_columns<Level, Dot::kColumns>(block, first + n, w, sums.of + n,
                                                      sums.excess + n);
    }
    for (; n < columns; ++n) {
      multiply_unpacked_columns<Level, 1>(block, first + n, w, sums.of + n, sums.excess + n);
    }
    finish_rows(block, sums.of, sums.excess, 0, block.rows, first, columns);
  }
}

// Blocks whose rows are packed one after the other. A level that always takes the values in place
// has no way to unpack them.
template <typename Level = Nibbles>
inline void multiply_by_rows(const Block& block) {
  if constexpr (Level::kMostRowsInPlace < kMostRows) {
    if (is_w4(*block.gemm)) return multiply_unpacked<Level>(block);
  }
  multiply_rows(block);
}
