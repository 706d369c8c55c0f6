// The parts of rows that the streaming GEMM's warps take, and its shared memory. Kernel ring: no
// torch; this needs no CUDA compiler and no GPU.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/device.h"
#include "sqk/gemm.h"

namespace sqk {

// A warp takes 16 channels at a time, the rows of mma.sync's A, and groups of 8 tokens, B's
// columns.
constexpr int kStreamChannels = 16;
constexpr int kGroupTokens = 8;
// Parts of a row of weights, in bytes. A lane loads a piece, four lanes load a chunk. A stage is
// requested at once: two chunks, so that one warp requests a whole 128-byte line of L2.
constexpr int kPiece = 16;
constexpr int kChunk = 64;
constexpr int kStage = 2 * kChunk;
// Stages in flight per warp. 16 warps then have 96 KiB of weights in flight per SM, about five
// times an H100's bandwidth-delay product (3.35 TB/s x 0.7 us: 18 KiB per SM). The surplus helps in
// the last wave, when only some of the SMs still have work.
constexpr int kStreamStages = 3;
constexpr int kStreamWarps = 16;  // at most, per block

// With weights of 4 bits, a chunk is a group, and it meets two chunks of activations.
static_assert(kChunk == kW4Bytes);
// The activations that a stage of weights meets, in bytes, which is elements of k.
template <bool kW4>
constexpr int kStageK = kW4 ? kStage / kW4Bytes * kW4Group : kStage;
// The steps and offsets of 16 channels and a group are 32 bytes at an even address. They are copied
// by words, so there may be one more, and this is a multiple of 16.
constexpr int kStepsPlace = 48;
// The shared memory of a warp for its weights, in bytes.
constexpr int kWeightRing = kStreamStages * kStreamChannels * kStage;
template <bool kW4>
constexpr int kWarpRing = kWeightRing + (kW4 ? kStreamStages * 2 * kStepsPlace : 0);
// One for each scheduler of an SM. Fewer would not unpack weights of 4 bits as fast as they arrive.
constexpr int kFewestW4Warps = 4;

// A block's shared memory has the warps' weights, then the activations, then these.
template <int kGroups>
struct StreamSums {
  int32_t sum[2][4 * kGroups][32];  // of all warps; two tiles in turn
  float x_scale[kGroupTokens * kGroups];
  uint32_t maxima[kStreamWarps];
};

// Per row.
constexpr int64_t stream_stages(int64_t k, bool w4) {
  return divide_up(k, w4 ? kStageK<true> : kStageK<false>);
}

constexpr int64_t activation_bytes(int64_t m, int64_t k, int groups, int warps, bool resident,
                                   bool w4) {
  return resident ? m * stream_stages(k, w4) * (w4 ? kStageK<true> : kStageK<false>)
                  : int64_t{warps} * kStreamStages * groups * kGroupTokens * kStage;
}

constexpr int64_t stream_shared_bytes(int64_t activation_bytes, int groups, int warps, bool w4) {
  return int64_t{warps} * (w4 ? kWarpRing<true> : kWarpRing<false>)+activation_bytes +
         (groups == 1 ? sizeof(StreamSums<1>) : sizeof(StreamSums<2>));
}

// Whether a tile for `tile_m` tokens can compute the problem. A stage of 4-bit weights meets so
// many activations that reading them anew for each tile would take longer than the weights; so they
// must fit into shared memory. Tiles that share them among more channels serve longer rows.
constexpr bool stream_serves(int64_t tile_m, const GemmParams& p, const Device& device) {
  const int groups = tile_m > kGroupTokens ? 2 : 1;
  if (p.m > tile_m) return false;
  return !is_w4(p) ||
         stream_shared_bytes(activation_bytes(p.m, p.k, groups, kFewestW4Warps, true, true), groups,
                             kFewestW4Warps, true) <= device.shared_bytes;
}

}  // namespace sqk
