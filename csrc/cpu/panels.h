// The GEMM of a block of packed rows, panel by panel of columns. Included by the files of the
// levels only, in an anonymous namespace, after simd.h and a struct Dot:
//
//   X            the type of a packed activation
//   kX           the value of a packed 0
//   kStep        channels that one call of `dot` adds, at most kVector
//   kRows        rows of the largest micro-kernel
//   kColumns     its columns; divides kPanel
//   XVector, WVector, Sum
//   read_x(const X*), read_w(const int8_t*)        kStep channels
//   read_w_some(const int8_t*, int64_t count)      the rest are 0
//   dot(Sum, XVector, WVector)                     adds kStep products to the lanes of a sum
//   ones_dot(Sum, WVector)                         adds kX times each weight
//   totals<kCount>(const Sum*, int32_t*)           the sums over the lanes of kCount sums
//
// A weight stays [n, k] as it is: a micro-kernel takes kRows rows of activations and kColumns rows
// of the weight, along k, and adds up the lanes at the end. So nothing is packed at all but the
// activations, which are small.

// Channels that are added before the sums leave the registers: kColumns rows of the weight then
// stay in the L1 cache while all rows of the block are multiplied.
constexpr int64_t kDepth = 4096;

// The sums of a panel: [rows, kPanel]. With kX, a sum and its excess may pass 2^31: both wrap
// around, and their difference, which fits, is right.
struct Sums {
  alignas(64) int32_t of[kMostRows * kPanel];
  // kX times the sum of each column's weights, which `of` contains too much.
  alignas(64) int32_t excess[kPanel];
};

// What a micro-kernel reads, all at the same channel.
struct Corner {
  const Dot::X* x;
  int64_t x_stride;
  const int8_t* w;
  int64_t w_stride;
  int64_t depth;
  const int8_t* ahead;  // rows of the weight to bring into the L2 cache meanwhile
};
// How far ahead of its use a weight is prefetched, in bytes: some 0.3 us of reading.
constexpr int64_t kAheadBytes = 8192;

template <int kRows, int kColumns>
inline void add_step(Dot::Sum (&acc)[kRows][kColumns], const Corner& c, int64_t at,
                     const Dot::WVector (&w)[kColumns]) {
  for (int r = 0; r < kRows; ++r) {
    const Dot::XVector x = Dot::read_x(c.x + r * c.x_stride + at);
    for (int n = 0; n < kColumns; ++n) acc[r][n] = Dot::dot(acc[r][n], x, w[n]);
  }
}

// Sums of kRows x kColumns products over c.depth channels. kExcess: those of the weights as well.
// kAhead: how many rows it prefetches.
template <int kRows, int kColumns, bool kExcess, int kAhead>
inline void multiply_corner(const Corner& c, int32_t* sums, int32_t* excess, bool add) {
  Dot::Sum acc[kRows][kColumns] = {};
  Dot::Sum weights[kColumns] = {};
  Dot::WVector w[kColumns];
  const auto step = [&](int64_t at) {
    add_step<kRows, kColumns>(acc, c, at, w);
    for (int n = 0; n < kAhead; ++n) __builtin_prefetch(c.ahead + n * c.w_stride + at, 0, 2);
    if constexpr (kExcess) {
      for (int n = 0; n < kColumns; ++n) weights[n] = Dot::ones_dot(weights[n], w[n]);
    }
  };
  int64_t at = 0;
  for (; at + Dot::kStep <= c.depth; at += Dot::kStep) {
    for (int n = 0; n < kColumns; ++n) w[n] = Dot::read_w(c.w + n * c.w_stride + at);
    step(at);
  }
  if (at < c.depth) {
    for (int n = 0; n < kColumns; ++n) {
      w[n] = Dot::read_w_some(c.w + n * c.w_stride + at, c.depth - at);
    }
    step(at);
  }
  const auto finish = [&](const Dot::Sum* found, int32_t* to) {
    int32_t totals[kColumns + 4];
    Dot::totals<kColumns>(found, totals);
    for (int n = 0; n < kColumns; ++n) {
      const auto before = static_cast<uint32_t>(add ? to[n] : 0);
      to[n] = static_cast<int32_t>(before + static_cast<uint32_t>(totals[n]));
    }
  };
  for (int r = 0; r < kRows; ++r) finish(acc[r], sums + r * kPanel);
  if constexpr (kExcess) finish(weights, excess);
}

// The rows of a block that remain, fewer than kRows.
template <int kRows, int kColumns>
inline void multiply_rest(int64_t rows, const Corner& c, int32_t* sums, bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rest<kRows - 1, kColumns>(rows, c, sums, add);
  }
  if (rows > 0) multiply_corner<kRows, kColumns, false, 0>(c, sums, nullptr, add);
}

// All rows of the block and c.depth channels of kColumns columns of the weight.
template <int kColumns>
inline void multiply_depth(int64_t rows, Corner c, bool prefetch, bool add, int32_t* sums,
                           int32_t* excess) {
  constexpr bool kExcess = Dot::kX != 0;
  constexpr int kShare = kColumns > 1 ? 2 : 1;
  int64_t row = 0;
  const auto advance = [&](int64_t count) {
    row += count;
    c.x += count * c.x_stride;
  };
  // With few rows the memory sets the pace, and the first corner prefetches everything. It has
  // two rows, which leaves registers for the excess.
  int64_t wanted = prefetch ? kColumns : 0;
  if (rows == 1) {
    multiply_corner<1, kColumns, kExcess, kColumns>(c, sums, excess, add);
  } else if (rows <= 2 * Dot::kRows) {
    multiply_corner<2, kColumns, kExcess, kColumns>(c, sums, excess, add);
    wanted = 0;
  } else {
    multiply_corner<2, kColumns, kExcess, 0>(c, sums, excess, add);
  }
  advance(rows == 1 ? 1 : 2);
  // With more, the next corners share the prefetch, so that none of them waits for it.
  for (; wanted >= kShare && row + Dot::kRows <= rows; wanted -= kShare, advance(Dot::kRows)) {
    multiply_corner<Dot::kRows, kColumns, false, kShare>(c, sums + row * kPanel, nullptr, add);
    c.ahead += kShare * c.w_stride;
  }
  for (; row + Dot::kRows <= rows; advance(Dot::kRows)) {
    multiply_corner<Dot::kRows, kColumns, false, 0>(c, sums + row * kPanel, nullptr, add);
  }
  multiply_rest<Dot::kRows - 1, kColumns>(rows - row, c, sums + row * kPanel, add);
}

// kColumns columns of the weight and all rows of the block, and the prefetch of later columns, of
// which `left` remain.
template <int kColumns>
inline void multiply_columns(int64_t rows, const Corner& start, int64_t left, int32_t* sums,
                             int32_t* excess) {
  const int64_t ahead = divide_up(kAheadBytes, kColumns * start.depth) * kColumns;
  const bool prefetch = ahead + kColumns <= left;
  for (int64_t done = 0; done < start.depth; done += kDepth) {
    Corner c = start;
    c.x += done;
    c.w += done;
    c.depth = start.depth - done < kDepth ? start.depth - done : kDepth;
    c.ahead = c.w + (prefetch ? ahead : 0) * c.w_stride;
    const bool add = done > 0;
    multiply_depth<kColumns>(rows, c, prefetch, add, sums, excess);
  }
}

// --- packed rows, and whole blocks ---------------------------------------------------------------

inline int64_t packed_row(int64_t k) { return round_up(k, kVector); }

// Of kGroup rows.
inline int64_t group_bytes(int64_t k) {
  return kGroup * packed_row(k) * static_cast<int64_t>(sizeof(Dot::X));
}

// X = x + kX, row by row. Channels beyond k may hold anything, because their weights are read as 0.
inline void pack_rows(const int8_t* x_q, int64_t stride, int64_t rows, int64_t k, uint8_t* packed) {
  auto* to = reinterpret_cast<Dot::X*>(packed);
  const int64_t length = packed_row(k);
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* from = x_q + row * stride;
    for (int64_t i = 0; i < length; ++i) {
      to[row * length + i] = static_cast<Dot::X>(from[i] + Dot::kX);
    }
  }
}

inline void multiply_rows(const Block& block) {
  const GemmParams& p = *block.gemm;
  Sums sums;
  if constexpr (Dot::kX == 0) std::memset(sums.excess, 0, sizeof sums.excess);
  Corner c = {};
  c.x = reinterpret_cast<const Dot::X*>(block.x);
  c.x_stride = packed_row(p.k);
  c.w_stride = p.w_q_stride;
  c.depth = p.k;
  for (int64_t first = block.first_column; first < block.last_column; first += kPanel) {
    const int64_t left = block.last_column - first, columns = left < kPanel ? left : kPanel;
    int64_t n = 0;
    for (; n + Dot::kColumns <= columns; n += Dot::kColumns) {
      c.w = p.w_q + (first + n) * p.w_q_stride;
      multiply_columns<Dot::kColumns>(block.rows, c, block.last_column - first - n, sums.of + n,
                                      sums.excess + n);
    }
    for (; n < columns; ++n) {
      c.w = p.w_q + (first + n) * p.w_q_stride;
      multiply_columns<1>(block.rows, c, 0, sums.of + n, sums.excess + n);
    }
    finish_rows(block, sums.of, sums.excess, 0, block.rows, first, columns);
  }
}
