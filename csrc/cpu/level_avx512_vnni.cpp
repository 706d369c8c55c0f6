// AVX-512 with 8-bit dot products (VNNI): Cascade Lake, Ice Lake, Zen 4 and newer. CPU ring: no
// torch, no CUDA.
#define SQK_LEVEL kKernelsAvx512Vnni
#include "cpu/level.h"

namespace sqk {
namespace {

#include "cpu/dot512.h"
#include "cpu/panels.h"

}  // namespace

SQK_LEVEL_WITHOUT_TILES
}  // namespace sqk
