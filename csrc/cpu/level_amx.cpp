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
#include "cpu/nibbles512.h"
#include "cpu/panels.h"
#include "cpu/w4.h"
#include "cpu/interleaved.h"
#include "cpu/tile_output.h"
#include "cpu/tiles.h"
#include "cpu/scores512.h"
#include "cpu/attend.h"
// clang-format on

}  // namespace

SQK_LEVEL_TABLE(pack_interleaved<0>, multiply_tiles, is_for_tiles, kTileColumns)
}  // namespace sqk
