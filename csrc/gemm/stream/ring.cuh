// How weights reach the warp that multiplies them: through a ring of stages in shared memory. A
// lane reads only those weights that it has copied itself. Kernel ring: no torch.
//
// Why cp.async and not loads into registers: data in flight needs no registers and none of a warp's
// six scoreboards, arrives in order, and keeps arriving while the warp adds up and stores its tile,
// because the ring continues from one tile to the next. No lane reads what another has copied, so a
// wait is enough and no barrier is needed. Only the steps and offsets of 4-bit weights are shared:
// they take a barrier of the warp.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "gemm/stream/chunks.cuh"
#include "gemm/stream/params.cuh"

namespace sqk {

// cp.async to a generic address. `from` is a multiple of 16.
__device__ inline void copy_piece(void* to, const int8_t* from) {
  copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(to)), from);
}
// The same, but only the first `bytes` exist (none if negative); the rest becomes 0.
__device__ inline void copy_piece(void* to, const int8_t* from, int bytes) {
  copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(to)), from, max(0, min(kPiece, bytes)));
}

// One warp's weights and the parts of x_q that they meet, in the order in which it multiplies them.
// Block b takes tiles b, b + blocks, ...; its warp w takes stages w, w + warps, ... of their rows,
// so adjacent warps read adjacent memory. Lane 4 g + t takes channels g and g + 8 of the tile,
// tokens g and g + 8, and bytes 16 t to 16 t + 15 of each chunk. kQuantized: the block quantizes x
// itself, into shared memory.
template <int kGroups, bool kQuantized, bool kW4, typename Params>
class StreamRing {
 public:
  using Chunk = StreamChunk<kGroups, kW4>;

  __device__ StreamRing(const Params& p, uint8_t* shared)
      : p_(p),
        warps_(blockDim.x / 32),
        lane_(threadIdx.x % 32),
        tile_(p.first_tile()),
        stage_(threadIdx.x / 32) {
    const int warp = threadIdx.x / 32;
    weights_ = shared + warp * kWarpRing<kW4> + lane_ * kPiece;
    activations_ = shared + warps_ * kWarpRing<kW4> + lane_ * kPiece;
    if (!resident()) activations_ += warp * (kStreamStages * kXStage);
    if (stage_ >= p.stages) tile_ = p.tiles;  // short rows: no work for this warp
    find_row();
  }

  // Requests as many stages as the ring has.
  __device__ void start() {
#pragma unroll 1
    for (int i = 0; i < kStreamStages; ++i) {
      request();
      step();
    }
  }

  // Waits for the oldest stage, reads it, and requests another one in its place.
  __device__ void next(int stage, Chunk (&chunk)[2]) {
    wait_for_copies<kStreamStages - 1>();
    if constexpr (kW4) __syncwarp();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        chunk[c].w[h] = *reinterpret_cast<const uint4*>(weight_place(c, h));
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          // Tokens beyond m are 0 and are not in shared memory.
          chunk[c].x[part][i] = make_uint4(0, 0, 0, 0);
          if (token(i) < p_.epilogue.m) {
            chunk[c].x[part][i] = *reinterpret_cast<const uint4*>(
                resident() ? resident_place((2 * stage + c) * kParts + part, i)
                           : activation_place(c, i));
          }
        }
      }
      if constexpr (kW4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          chunk[c].pair[h] = *reinterpret_cast<const uint16_t*>(step_place(c) + 2 * (lane_ / 4) +
                                                                odd_pair(c) * 2 + 16 * h);
        }
      }
    }
    if constexpr (kW4) __syncwarp();
    request();
    step();
  }

 private:
  static constexpr int kLoad = 32 * kPiece;  // bytes that a warp loads at a time
  static constexpr int kXStage = 2 * kGroups * kLoad;
  static constexpr int kParts = Chunk::kParts;

  __device__ bool resident() const { return kQuantized || kW4 || p_.resident; }
  __device__ int token(int i) const { return lane_ / 4 + kGroupTokens * i; }
  __device__ uint8_t* weight_place(int c, int h) const {
    return weights_ + slot_ * (4 * kLoad) + (2 * c + h) * kLoad;
  }
  __device__ uint8_t* activation_place(int c, int i) const {
    return activations_ + slot_ * kXStage + (kGroups * c + i) * kLoad;
  }
  // Of the warp: the words of w_group that hold the tile's pairs of group c of the stage.
  __device__ uint8_t* step_place(int c) const {
    return weights_ - lane_ * kPiece + kWeightRing + (2 * slot_ + c) * kStepsPlace;
  }
  // 1 if the pairs start in the middle of a word: n is odd, and the number of the group too.
  __device__ int odd_pair(int c) const { return c & p_.epilogue.n; }
  // Chunk after chunk; within a chunk, token after token.
  __device__ const uint8_t* resident_place(int chunk, int i) const {
    return activations_ + chunk * (p_.epilogue.m * kChunk) + i * kLoad;
  }

  __device__ void find_row() {
    const int64_t channel = int64_t{tile_} * kStreamChannels + lane_ / 4;
    row_ = p_.w_q + channel * p_.w_q_stride + lane_ % 4 * kPiece;
  }
  __device__ void step() { slot_ = slot_ == kStreamStages - 1 ? 0 : slot_ + 1; }

  // Commits a group of copies even if it is empty: next() counts groups.
  __device__ void request() {
    if (tile_ < p_.tiles) {
      const int begin = stage_ * kStage;
      const int channels = p_.epilogue.n - tile_ * kStreamChannels;
      const int8_t* const upper = row_ + 8 * p_.w_q_stride + begin;
      const int end = kW4 ? p_.w_bytes : p_.k;
      // The same for the whole warp, so that only the last stages and tiles pay for the checks.
      if (begin + kStage <= end && channels >= kStreamChannels) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          copy_piece(weight_place(c, 0), row_ + begin + c * kChunk);
          copy_piece(weight_place(c, 1), upper + c * kChunk);
        }
      } else {
        const int left = end - begin - lane_ % 4 * kPiece;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          copy_piece(weight_place(c, 0), row_ + begin + c * kChunk,
                     lane_ / 4 < channels ? left - c * kChunk : 0);
          copy_piece(weight_place(c, 1), upper + c * kChunk,
                     lane_ / 4 + 8 < channels ? left - c * kChunk : 0);
        }
      }
      if (!resident()) request_activations(begin);
      if constexpr (kW4) request_steps();
      stage_ += warps_;
      if (stage_ >= p_.stages) {
        stage_ = threadIdx.x / 32;
        tile_ += p_.tile_step();
        find_row();
      }
    }
    commit_copies();
  }

  // Half a warp takes a group, a lane a word. Groups beyond the last one become 0, like their
  // weights; channels beyond the last one get what lies there.
  __device__ void request_steps() {
    const int c = lane_ / 16, word = lane_ % 16;
    if (word >= kStreamChannels / 2 + odd_pair(c)) return;
    const int64_t pairs = int64_t{2 * stage_ + c} * p_.epilogue.n + tile_ * kStreamChannels;
    const int8_t* const from = p_.w_group + 2 * (pairs - odd_pair(c)) + 4 * word;
    const int64_t left = p_.w_group_end - from;
    copy_word_async(static_cast<uint32_t>(__cvta_generic_to_shared(step_place(c) + 4 * word)), from,
                    static_cast<int>(left > 4   ? 4
                                     : left < 0 ? 0
                                                : left));
  }

  __device__ void request_activations(int begin) {
    const int offset = begin + lane_ % 4 * kPiece;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (token(i) >= p_.epilogue.m) continue;
      const int8_t* const from = p_.x_row(token(i)) + offset;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        copy_piece(activation_place(c, i), from + c * kChunk, p_.k - offset - c * kChunk);
      }
    }
  }

  const Params& p_;
  const int warps_, lane_;
  uint8_t* weights_;      // this lane's place in slot 0
  uint8_t* activations_;  // the same for activations, or its place in the resident ones
  const int8_t* row_;     // this lane's first byte of the tile to request
  int tile_, stage_;      // to request
  int slot_ = 0;          // to read, and then to fill again
};

}  // namespace sqk
