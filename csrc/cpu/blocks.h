// Blocks of packed rows, which the GEMMs multiply by a weight. CPU ring: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/layer.h"

namespace sqk {

// A block's packed rows stay in the L2 cache while all of the weight passes by. The more rows, the
// fewer bytes of the weight for each product. The other forms leave room for two panels of it.
inline int64_t block_bytes(Form form) { return l2_bytes() / 8 * (form == Form::kRows ? 6 : 5); }
// Packed rows that wait for the multiplication at the same time.
constexpr int64_t kWaitingBytes = 8 << 20;

// The rows of each block of m > 0 rows, a multiple of kGroup, so that all blocks have about as
// many.
inline int64_t rows_of_blocks(Form form, int64_t group_bytes, int64_t m) {
  const int64_t fit = block_bytes(form) / group_bytes;
  const int64_t groups = std::clamp(fit, int64_t{1}, kMostRows / kGroup);
  const int64_t blocks = divide_up(m, groups * kGroup);
  return round_up(divide_up(m, blocks), kGroup);
}

// Packs up to kGroup rows of int8; row i is at row_at(i). Rows that cannot be read up to a multiple
// of kVector go through the scratch, and so do those that are not `adjacent`: row 0 and a stride.
template <typename RowAt>
void pack_group(const Kernels& kernels, Form form, int64_t k, int64_t rows, bool adjacent,
                int64_t stride, const RowAt& row_at, const RowScratch& scratch, uint8_t* packed) {
  const int8_t* x_q = scratch.x_q;
  if (adjacent && k % kVector == 0) {
    x_q = row_at(0);
  } else {
    stride = scratch.stride;
    for (int64_t i = 0; i < rows; ++i) {
      int8_t* to = scratch.x_q + i * stride;
      std::memcpy(to, row_at(i), static_cast<size_t>(k));
      std::memset(to + k, 0, static_cast<size_t>(stride - k));
    }
  }
  kernels.pack(x_q, stride, rows, k, form, packed);
}

}  // namespace sqk
