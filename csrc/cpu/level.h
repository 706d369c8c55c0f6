// The beginning of a level's file: `#define SQK_LEVEL kKernels...`, this header, a struct Dot and
// cpu/panels.h and cpu/w4.h in namespace sqk { namespace { ... } }, and the table of kernels.
//
// All code is in an anonymous namespace. An inline function that two levels share by its name would
// be linked once, perhaps with instructions that the processor lacks. For the same reason a level
// uses no template of the standard library that might not be inlined.
#pragma once

// Vectors never cross the border of a file, so the ABI of passing them does not matter. The other
// warning is about the compiler's own intrinsics.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/arithmetic.h"
#include "cpu/cache.h"
#include "cpu/kernels.h"
#include "cpu/scale.h"

namespace sqk {
namespace {

// Each needs those before it.
// clang-format off
#include "cpu/simd.h"
#include "cpu/activations.h"
#include "cpu/rows.h"
#include "cpu/output.h"
#include "cpu/gated.h"
#include "cpu/combine.h"
// clang-format on

}  // namespace
}  // namespace sqk

// The table of a level. `pack` and `multiply` are for interleaved rows, `kept(rows, k)` says when
// they are faster, and `unit` is their columns. Where they are not, a weight of 4 bits is
// multiplied as it is if there are few enough rows, and otherwise unpacked.
#define SQK_LEVEL_TABLE(pack, multiply, kept, unit)                                            \
  extern const Kernels SQK_LEVEL;                                                              \
  const Kernels SQK_LEVEL = {                                                                  \
      values,                                                                                  \
      round_values,                                                                            \
      [](int64_t k, Form form) -> int64_t {                                                    \
        return form == Form::kNibbles ? kGroup * nibble_row(k) : group_bytes(k);               \
      },                                                                                       \
      [](const int8_t* x_q, int64_t stride, int64_t rows, int64_t k, Form form, uint8_t* to) { \
        form == Form::kNibbles ? pack_for_nibbles(x_q, stride, rows, k, to)                    \
        : form == Form::kRows  ? pack_rows(x_q, stride, rows, k, to)                           \
                               : pack(x_q, stride, rows, k, to);                               \
      },                                                                                       \
      [](const Block& block, Form form) {                                                      \
        form == Form::kNibbles ? multiply_nibbles(block)                                       \
        : form == Form::kRows  ? multiply_by_rows(block)                                       \
                               : multiply(block);                                              \
      },                                                                                       \
      [](int64_t rows, int64_t k, bool w4) {                                                   \
        return kept(rows, k)                             ? Form::kInterleaved                  \
               : w4 && rows <= Nibbles::kMostRowsInPlace ? Form::kNibbles                      \
                                                         : Form::kRows;                        \
      },                                                                                       \
      [](Form form) -> int64_t {                                                               \
        return form == Form::kNibbles ? kNibbleColumns                                         \
               : form == Form::kRows  ? int64_t{Dot::kColumns}                                 \
                                      : int64_t{unit};                                         \
      },                                                                                       \
      attend,                                                                                  \
      merge_parts,                                                                             \
      combine_token,                                                                           \
  };

// The table of a level that packs rows in one form.
#define SQK_LEVEL_BY_ROWS                                                             \
  SQK_LEVEL_TABLE(pack_rows, multiply_rows, ([](int64_t, int64_t) { return false; }), \
                  int64_t{Dot::kColumns})
