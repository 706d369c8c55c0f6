// The operand tiles that wgmma reads from shared memory through matrix descriptors.
#pragma once
#include "exec.h"

namespace ptxsim {
// Rows [first, first + count) of an operand tile, each row_bytes wide (K elements).
struct TileRows {
  u64 descriptor;
  int first, count, row_bytes, element_bytes;
  bool transposed;  // false: K-major, rows of 16-byte chunks along K; true: MN-major, 16-bit types
};

// Copies the rows into out[count][row_bytes].
// check: reports races; bad: if given, bad[r] is set for a row that reads uninitialized bytes.
void fetch_tile(Warp& warp, const TileRows& rows, u8* out, bool check, u8* bad = nullptr);

u64 hash_tile(const u8* data, size_t bytes);
}  // namespace ptxsim
