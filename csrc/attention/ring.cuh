// How keys, values and their scales reach the warp that multiplies them: through a ring of tiles of
// 16 tokens in shared memory, one ring for each warp. So the warps wait for no barrier. Kernel
// ring: no torch.
#pragma once

#include <cstdint>

#include "attention/kernels.h"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace sqk {

// The positions that a sequence's queries may attend to, and this block's part of them.
struct DecodeRange {
  int32_t length;          // tokens of the sequence
  int32_t first;           // position; nothing before it is read
  int32_t last;            // the position after the last
  int32_t active;          // splits that have tokens
  int32_t tile, end_tile;  // of 16 positions, of this block

  __device__ DecodeRange(const DecodeParams& p, int sequence, int split) {
    const int64_t given = p.a.lengths == nullptr ? p.holding : p.a.lengths[sequence];
    length = static_cast<int32_t>(min(max(given, int64_t{0}), kMostPositions));
    const int32_t holding = static_cast<int32_t>(p.holding);
    first = p.a.cache.ring ? max(0, length - holding) : 0;
    last = p.a.cache.ring ? length : min(length, holding);
    if (p.window > 0) {
      first = max(first, length - static_cast<int32_t>(p.a.tokens) + 1 - p.window);
    }
    const int32_t from = first / kTileTokens, to = divide_up(last, kTileTokens);
    const auto chunks =
        static_cast<uint32_t>(last > first && holding > 0 ? divide_up(to - from, kDecodeWarps) : 0);
    // Parts differ by at most one chunk. They follow the length, which is the same for all blocks
    // of a sequence, so they know of each other without a word.
    active = static_cast<int32_t>(min(chunks, static_cast<uint32_t>(p.splits)));
    const auto begin = [&](uint32_t part) {
      return from + static_cast<int32_t>(kDecodeWarps * (uint64_t{part} * chunks / active));
    };
    tile = split < active ? begin(split) : 0;
    end_tile = split < active ? min(to, begin(split + 1)) : 0;
  }
};

// One warp's ring. Its tiles are kDecodeWarps apart.
template <int kD>
class DecodeRing {
 public:
  static constexpr int kStages = decode_stages(kD);
  static constexpr int kStageBytes = decode_stage_bytes(kD);
  static constexpr int kValues = kTileTokens * kD, kScales = 2 * kValues;  // offsets in a stage

  __device__ DecodeRing(const DecodeParams& p, const DecodeRange& range, int sequence, int head,
                        uint32_t shared)
      : p_(p), range_(range), sequence_(sequence), lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    shared_ = shared + warp * decode_ring_bytes(kD);
    tile_ = range.tile + warp;
    keys_ = p.a.cache.k.data + head * p.a.cache.k.head_stride + piece() * 16;
    values_ = p.a.cache.v.data + head * p.a.cache.v.head_stride + piece() * 16;
    const KvHalf& half = lane_ < kTileTokens ? p.a.cache.k : p.a.cache.v;
    scale_ = half.scale == nullptr ? nullptr : half.scale + head * half.scale_head_stride;
    scale_stride_ = half.scale_block_stride;
    // Static scales are folded into the queries and the outputs: nothing is copied over these.
    if (scale_ == nullptr) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        const uint32_t to = shared_ + stage * kStageBytes + kScales + 4 * lane_;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(1.0f) : "memory");
      }
    }
    locate();
#pragma unroll 1
    for (int stage = 0; stage + 1 < kStages; ++stage) request();
  }

  // The next tile's place in shared memory, when it has arrived. All lanes have read the one
  // before.
  __device__ uint32_t next() {
    __syncwarp();
    request();
    wait_for_copies<kStages - 1>();
    __syncwarp();
    const uint32_t stage = shared_ + turn_ * kStageBytes;
    turn_ = turn_ + 1 == kStages ? 0 : turn_ + 1;
    return stage;
  }

 private:
  static constexpr int kPieces = kD / 16, kRows = 32 / kPieces;  // rows of one copy of the warp

  __device__ int piece() const { return lane_ % kPieces; }

  // Finds the block and the slot of token lane % 16 of the next tile, one tile ahead, because a
  // table is read for it. Slot -1: there is no such token.
  __device__ void locate() {
    const int position = tile_ * kTileTokens + lane_ % kTileTokens;
    slot_ = -1;
    if (tile_ >= range_.end_tile || position < range_.first || position >= range_.last) return;
    int quotient;
    p_.block_size(quotient, slot_, position);
    block_ = sequence_;
    if (p_.a.cache.table != nullptr) {
      block_ = p_.a.cache.table[sequence_ * p_.a.cache.table_stride + quotient];
      block_ = max(0, min(block_, static_cast<int>(p_.a.cache.blocks) - 1));
    }
  }

  // Tokens and channels that do not exist become 0.
  __device__ void request() {
    if (tile_ < range_.end_tile) {
      const uint32_t stage = shared_ + to_ * kStageBytes;
      const int64_t row = int64_t{slot_} * p_.pitch;
      const int64_t key = block_ * p_.a.cache.k.block_stride + row;
      const int64_t value = block_ * p_.a.cache.v.block_stride + row;
      const bool inside = piece() * 16 < p_.pitch;
#pragma unroll
      for (int i = 0; i < kTileTokens / kRows; ++i) {
        const int token = i * kRows + lane_ / kPieces;
        const int64_t from_key = __shfl_sync(kWholeWarp, key, token);
        const int64_t from_value = __shfl_sync(kWholeWarp, value, token);
        const bool exists = __shfl_sync(kWholeWarp, slot_, token) >= 0 && inside;
        const uint32_t to = stage + swizzled<kD>(token, piece());
        copy_async(to, exists ? keys_ + from_key : p_.a.cache.k.data, exists ? 16 : 0);
        copy_async(to + kValues, exists ? values_ + from_value : p_.a.cache.v.data,
                   exists ? 16 : 0);
      }
      if (scale_ != nullptr) {
        const bool exists = slot_ >= 0;
        copy_word_async(stage + kScales + 4 * lane_,
                        exists ? scale_ + block_ * scale_stride_ + slot_ : scale_, exists ? 4 : 0);
      }
      tile_ += kDecodeWarps;
      to_ = to_ + 1 == kStages ? 0 : to_ + 1;
      locate();
    }
    commit_copies();  // also without copies: the wait counts groups
  }

  static constexpr unsigned kWholeWarp = 0xffffffffu;

  const DecodeParams& p_;
  const DecodeRange& range_;
  int sequence_, lane_;
  uint32_t shared_;
  const int8_t *keys_, *values_;
  const float* scale_;  // of keys in the lower half of the warp, of values in the upper
  int64_t scale_stride_;
  int tile_;      // to request next
  int to_ = 0;    // the stage for it
  int turn_ = 0;  // the stage to multiply next
  int block_ = 0, slot_ = -1;
};

}  // namespace sqk
