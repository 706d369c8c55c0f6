// Where rows of int8 lie in shared memory. Kernel ring: no torch.
#pragma once

namespace sqk {

// Where a piece of 16 bytes of a tile's row lies in shared memory. A row has kK bytes, and a line
// across all banks 128. ldmatrix reads the same piece of eight adjacent rows at a time, and
// cp.async writes whole lines: XORing the piece with the line's number spreads both over all banks.
// Two rows of 64 bytes share a line, in different halves of it, so eight rows are four lines. Of a
// row of 256 bytes, the XOR leaves each half where it is.
template <int kK>
__device__ constexpr int swizzled(int row, int piece) {
  static_assert(kK == 64 || kK == 128 || kK == 256);
  constexpr int kRowsOfLine = kK < 128 ? 128 / kK : 1, kPieces = kK < 128 ? kK / 16 : 8;
  return row * kK + 16 * (piece ^ (row / kRowsOfLine % kPieces));
}

}  // namespace sqk
