// The parameters of the streaming GEMM's kernel, and the layout of its shared memory. Kernel ring:
// no torch.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "gemm/epilogue/params.cuh"
#include "sqk/gemm.h"
#include "sqk/quantize.h"

namespace sqk {

// A warp takes 16 channels at a time, the rows of mma.sync's A, and groups of 8 tokens, B's
// columns.
constexpr int kStreamChannels = 16;
constexpr int kGroupTokens = 8;
// Parts of a row, in bytes. A lane loads a piece, four lanes load a chunk. A stage is requested at
// once: two chunks, so that one warp requests a whole 128-byte line of L2.
constexpr int kPiece = 16;
constexpr int kChunk = 64;
constexpr int kStage = 2 * kChunk;
// Stages in flight per warp. 16 warps then have 96 KiB of weights in flight per SM, about five
// times an H100's bandwidth-delay product (3.35 TB/s x 0.7 us: 18 KiB per SM). The surplus helps in
// the last wave, when only some of the SMs still have work.
constexpr int kStreamStages = 3;
constexpr int kStreamWarps = 16;                                     // at most, per block
constexpr int kWarpRing = kStreamStages * kStreamChannels * kStage;  // bytes

struct StreamParams {
  Epilogue epilogue;
  const int8_t* w_q;
  int64_t w_q_stride;
  const int8_t* x_q;  // null: the activations are `x`, which the kernel quantizes
  int64_t x_q_stride;
  int32_t k;
  int32_t stages;            // per row
  int32_t tiles;             // of 16 channels
  int32_t activation_bytes;  // of shared memory
  bool resident;  // all of x_q is in shared memory; else a part comes with each stage of weights
  bool weights_first;  // GemmPlan::weights_first; only with resident activations

  const void* x;
  int64_t x_stride;
  int32_t rotation;  // as in QuantizeParams
  const float* inv_smooth;
  const float* scale;
  Scheme scheme;
  bool wide;  // rows of x and inv_smooth are whole vectors of 16 bytes, aligned to them
};

// A block's shared memory has the warps' weights, then the activations, then these.
template <int kGroups>
struct StreamSums {
  int32_t sum[2][4 * kGroups][32];  // of all warps; two tiles in turn
  float x_scale[kGroupTokens * kGroups];
  uint32_t maxima[kStreamWarps];
};

constexpr int64_t stream_stages(int64_t k) { return divide_up(k, kStage); }

constexpr int64_t activation_bytes(int64_t m, int64_t k, int groups, int warps, bool resident) {
  return resident ? m * stream_stages(k) * kStage
                  : int64_t{warps} * kStreamStages * groups * kGroupTokens * kStage;
}

}  // namespace sqk
