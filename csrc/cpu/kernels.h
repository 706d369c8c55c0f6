// What each level implements, and how the callers use it. CPU ring: no torch, no CUDA.
#pragma once

#include <cstdint>

#include "cpu/levels.h"
#include "sqk/attention.h"
#include "sqk/gemm.h"
#include "sqk/grouped.h"
#include "sqk/quantize.h"

namespace sqk {

// Rows are padded to this many elements in all buffers of the CPU kernels: no vector is longer.
constexpr int64_t kVector = 64;
// Rows that are packed together.
constexpr int64_t kGroup = 16;
// The int32 sums of a row that are held until the whole of k has been added.
constexpr int64_t kPanel = 48;
// The most rows of a block, which the sums of a panel on the stack are for.
constexpr int64_t kMostRows = 256;

// How a group of packed rows lies in memory.
enum class Form : int32_t {
  kRows,         // one after the other
  kInterleaved,  // side by side
  kNibbles,      // one after the other, in the order of the values of a weight of 4 bits
};

// Packed activations: `rows` rows of `k` channels, which one call multiplies by some columns.
struct Block {
  const GemmParams* gemm;
  const uint8_t* x;      // Kernels::packed_bytes for each group of rows
  int64_t first_row;     // of y and the residual
  int64_t rows;          // <= kMostRows
  const float* x_scale;  // of first_row, or of all rows
  float out_inverse;     // 1 / *gemm->out_scale, for int8
  int64_t first_column, last_column;
};

// Columns of a cache: the tokens of a sequence that are there, the oldest first. Attention takes
// this many at a time.
constexpr int64_t kTokenTile = 256;
// A query's share of a part: the largest score, the sum of the weights, 14 unused numbers, and the
// weighted sum of the values, [padded_head(dim)].
constexpr int64_t kStateHead = 16;
constexpr int64_t state_floats(int64_t dim) { return kStateHead + padded_head(dim); }

// Some columns of a sequence, and all queries of one head of the cache: row r is token r % tokens
// of query head r / tokens of the group.
struct Part {
  const AttentionParams* params;
  int64_t sequence, head;
  int64_t begin, end;  // columns
  int64_t oldest;      // position of column 0
  int64_t newest;      // column of the last query token; may be negative
  int64_t rows;
  const int8_t* q;  // [rows, kMaxHead], padded with zeros
  const float* q_scale;
  float* states;  // [rows, state_floats], written
};

// What one query's output is made of: the states of its parts, the oldest first.
struct Merge {
  const AttentionParams* params;
  const float* states;
  int64_t stride, parts;
  int64_t head;  // of the cache
  int64_t row;   // of y
};

// The kernels of a level. `form`: that of the packed rows, on which all calls must agree.
struct Kernels {
  // Reads row `row`, and computes v before quantization, smoothed and rotated: [k] floats, padded
  // with zeros to a multiple of kVector. Returns the bits of the largest |v|, which are ordered
  // like unsigned integers, with NaN above Inf.
  uint32_t (*values)(const QuantizeParams& params, int64_t row, float* v);
  // clamp(rint(v * inverse), -127, 127) for `count` values, padded as above; NaN becomes 0.
  // `ordinary`: no value is NaN or rounds beyond 127, which saves two operations.
  void (*round)(const float* v, int64_t count, float inverse, bool ordinary, int8_t* x_q);
  // Bytes of a packed group of kGroup rows.
  int64_t (*packed_bytes)(int64_t k, Form form);
  // Packs up to kGroup rows of k bytes. Every row is readable up to a multiple of kVector.
  void (*pack)(const int8_t* x_q, int64_t stride, int64_t rows, int64_t k, Form form,
               uint8_t* packed);
  // y for the rows of a block and the columns [first_column, last_column).
  void (*multiply)(const Block& block, Form form);
  // The form in which blocks of this many rows are fastest.
  Form (*form)(int64_t rows, int64_t k, bool w4);
  // Columns of a call are a multiple of this, except at the end.
  int64_t (*columns)(Form form);
  // Attention of a part, and the output of a query.
  void (*attend)(const Part& part);
  void (*merge)(const Merge& merge);
  // A token's weighted sum of the results of its experts.
  void (*combine)(const CombineParams& params, int64_t token);
};

#define SQK_DECLARE(level, text) extern const Kernels kKernels##level;
SQK_CPU_LEVELS(SQK_DECLARE)
#undef SQK_DECLARE

// Bytes of a core's L2 cache, or a cautious guess.
int64_t l2_bytes();

// The kernels of the level in use.
const Kernels& kernels();
// The kernels of a level, or null if this library or this processor lacks it.
const Kernels* kernels_of(int32_t level);

}  // namespace sqk
