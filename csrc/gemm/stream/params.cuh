// What the streaming GEMM's kernel is given, and how its shared memory is laid out. Kernel ring: no
// torch.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "gemm/epilogue/params.cuh"
#include "sqk/gemm.h"
#include "sqk/quantize.h"

namespace sqk {

// A warp takes 16 channels at a time, the rows of mma.sync's A, and 8 tokens a group, B's columns.
constexpr int kStreamChannels = 16;
constexpr int kGroupTokens = 8;
// Of a row, in bytes. A lane loads 16 and four lanes a chunk; a stage is what is requested at a
// time: two chunks, so that a 128-byte line of L2 is asked for by one warp in one go.
constexpr int kPiece = 16;
constexpr int kChunk = 64;
constexpr int kStage = 2 * kChunk;
// Stages of each warp in flight. 16 warps then have 96 KiB of weights under way on each SM, about
// five times what an H100's bandwidth times its latency asks for (3.35 TB/s, 0.7 us: 18 KiB per
// SM): the surplus carries the last wave, in which only some of the SMs still have work.
constexpr int kStreamStages = 3;
constexpr int kStreamWarps = 16;                                     // the most in a block
constexpr int kWarpRing = kStreamStages * kStreamChannels * kStage;  // bytes

struct StreamParams {
  Epilogue epilogue;
  const int8_t* w_q;
  int64_t w_q_stride;
  const int8_t* x_q;  // null: the activations are `x`, to be quantised
  int64_t x_q_stride;
  int32_t k;
  int32_t stages;            // per row
  int32_t tiles;             // of 16 channels
  int32_t activation_bytes;  // of shared memory
  bool resident;  // the whole of x_q in shared memory; else a part beside each stage of weights

  const void* x;
  int64_t x_stride;
  const float* inv_smooth;
  const float* scale;
  Scheme scheme;
  bool wide;  // rows of x and inv_smooth are whole vectors of 16 bytes, aligned to them
};

// Shared memory of a block, in bytes: the warps' weights, the activations, then these few.
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
