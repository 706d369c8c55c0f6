// AMX-INT8: Sapphire Rapids and newer. CPU ring: no torch, no CUDA.
//
// A tile of the weight, 16 rows of 64 channels as they lie in memory, is the first operand. So no
// weight is packed here either. The activations are the second one, which wants four channels of 16
// tokens side by side, and the product is y transposed: [16 columns, 16 tokens].
#define SQK_LEVEL kKernelsAmx
#include "cpu/level.h"

namespace sqk {
namespace {

// Each needs those before it.
// clang-format off
#include "cpu/dot512.h"
#include "cpu/panels.h"
#include "cpu/interleaved.h"
#include "cpu/tiles.h"
// clang-format on

}  // namespace

extern const Kernels SQK_LEVEL;
const Kernels SQK_LEVEL = {
    values,
    round_values,
    [](int64_t k, bool interleaved) { return interleaved ? interleaved_bytes(k) : row_bytes(k); },
    [](const int8_t* x_q, int64_t stride, int64_t rows, int64_t k, bool interleaved, uint8_t* to) {
      interleaved ? pack_interleaved<0>(x_q, stride, rows, k, to)
                  : pack_rows(x_q, stride, rows, k, to);
    },
    [](const Block& block, bool interleaved) {
      interleaved ? multiply_tiles(block) : multiply_rows(block);
    },
    // A tile takes as long for one token as for 16.
    [](int64_t rows, int64_t) { return rows >= kLeastTileRows; },
    [](bool interleaved) -> int64_t { return interleaved ? kTileColumns : Dot::kColumns; },
};
}  // namespace sqk
