// AVX-512 with 8-bit dot products (VNNI): Cascade Lake, Ice Lake, Zen 4 and newer. CPU ring: no
// torch, no CUDA.
#define SQK_LEVEL kKernelsAvx512Vnni
#include "cpu/level.h"

namespace sqk {
namespace {

// Each needs those before it.
// clang-format off
#include "cpu/dot512.h"
#include "cpu/panels.h"
#include "cpu/interleaved.h"
#include "cpu/wide512.h"
// clang-format on

}  // namespace

extern const Kernels SQK_LEVEL;
const Kernels SQK_LEVEL = {
    values,
    round_values,
    [](int64_t k, bool interleaved) { return interleaved ? interleaved_bytes(k) : row_bytes(k); },
    [](const int8_t* x_q, int64_t stride, int64_t rows, int64_t k, bool interleaved, uint8_t* to) {
      interleaved ? pack_interleaved<Dot::kX>(x_q, stride, rows, k, to)
                  : pack_rows(x_q, stride, rows, k, to);
    },
    [](const Block& block, bool interleaved) {
      interleaved ? multiply_wide(block) : multiply_rows(block);
    },
    is_wide,
    [](bool interleaved) -> int64_t { return interleaved ? kPanel : Dot::kColumns; },
};
}  // namespace sqk
