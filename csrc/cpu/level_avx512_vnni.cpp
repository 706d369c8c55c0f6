// AVX-512 with 8-bit dot products (VNNI): Cascade Lake, Ice Lake, Zen 4 and newer. CPU ring: no
// torch, no CUDA.
#define SQK_LEVEL kKernelsAvx512Vnni
#include "cpu/level.h"

namespace sqk {
namespace {

// Each needs those before it.
// clang-format off
#include "cpu/dot512.h"
#include "cpu/nibbles512.h"
#include "cpu/panels.h"
#include "cpu/w4.h"
#include "cpu/interleaved.h"
#include "cpu/wide512.h"
#include "cpu/scores512.h"
#include "cpu/attend.h"
// clang-format on

}  // namespace

SQK_LEVEL_TABLE(pack_interleaved<Dot::kX>, multiply_wide_block, is_wide, kPanel)
}  // namespace sqk
