// The warps that request, multiply and store in Hopper's GEMM by experts (grouped/wgmma.cuh).
// Kernel ring: no torch.
#pragma once

#include <algorithm>
#include <utility>

#include "cute/arch/mma_sm90_gmma.hpp"
#include "gemm/epilogue/channels.cuh"
#include "gemm/epilogue/tokens.cuh"
#include "gemm/grouped/epilogue.cuh"
#include "gemm/grouped/wgmma_params.cuh"

namespace sqk {

template <class Tile>
class GroupedLoader {
 public:
  __device__ GroupedLoader(const GroupedWgmmaParams& p, uint32_t shared) : p_(p), shared_(shared) {}

  // By one thread: all of the block's units.
  __device__ void run(const GroupedExperts<Tile>& experts) {
    StageRing<Tile::kStages> ring;
    const uint32_t units = experts.units();
    for (uint32_t number = blockIdx.x; number < units; number += gridDim.x) {
      const GroupedUnit now = experts.unit(number);
      for (int i = 0; i < p_.steps; ++i, ring.step()) load(now, i * Tile::kK, ring);
    }
    allow_next_kernel();
  }

 private:
  // Beyond the expert's tokens these are the next expert's, whose results are never stored. Beyond
  // its channels and beyond k they are 0.
  __device__ void load(const GroupedUnit& now, int k, const StageRing<Tile::kStages>& ring) {
    const uint32_t full = shared_ + Tile::kBarriersAt + 16 * ring.stage;
    const uint32_t rows = shared_ + ring.stage * Tile::kRowBytes;
    const uint32_t columns = shared_ + Tile::kColumnsAt + ring.stage * Tile::kColumnBytes;
    wait_for_barrier(full + 8, ring.parity ^ 1);
    arrive_expecting(full, Tile::kStageBytes);
    copy_box(Tile::kSwap ? rows : columns, p_.w, k, now.channel0, now.expert, full);
    copy_box(Tile::kSwap ? columns : rows, p_.x, k, now.token0, full);
  }

  const GroupedWgmmaParams& p_;
  const uint32_t shared_;
};

template <int kColumns>
struct GroupedAtom;
#define SQK_ATOM(columns)                                               \
  template <>                                                           \
  struct GroupedAtom<columns> {                                         \
    using Type = cute::SM90::GMMA::MMA_64x##columns##x32_S32S8S8_SS_TN; \
  };
SQK_ATOM(16)
SQK_ATOM(32)
SQK_ATOM(64)
SQK_ATOM(128)
SQK_ATOM(256)
#undef SQK_ATOM

// acc[64 rows, columns] += the 32 of k of both at these descriptors.
template <int kColumns, size_t... kAt>
__device__ inline void multiply_stage(uint32_t (&acc)[kColumns / 2], uint64_t rows,
                                      uint64_t columns, std::index_sequence<kAt...>) {
  GroupedAtom<kColumns>::Type::fma(rows, columns, acc[kAt]...);
}

template <class Tile>
class GroupedConsumer {
 public:
  static constexpr int kSums = Tile::kColumns / 2;  // of a thread

  __device__ GroupedConsumer(const GroupedWgmmaParams& p, uint32_t shared)
      : p_(p),
        barriers_(shared + Tile::kBarriersAt),
        rows_(descriptor(shared + static_cast<int>(threadIdx.x) / 128 * 64 * Tile::kK)),
        columns_(descriptor(shared + Tile::kColumnsAt)) {}

  __device__ void run(const GroupedExperts<Tile>& experts) {
    const uint32_t units = experts.units();
    for (uint32_t number = blockIdx.x; number < units; number += gridDim.x) {
      uint32_t acc[kSums];
      multiply(acc);
      store(experts.unit(number), acc);
    }
    clear(0, experts.first_token());
    clear(experts.last_token(), p_.epilogue.m);
  }

 private:
  // The lower half of a descriptor. It counts in units of 16 bytes and is the part that changes.
  __device__ static uint32_t descriptor(uint32_t address) { return 1u << 16 | address >> 4; }

  // Rows of 128 bytes in groups of eight, with their pieces XORed as TMA leaves them.
  __device__ static uint64_t descriptor_of(uint32_t lower) {
    constexpr uint64_t kSwizzle128 = 1, kGroupOfRows = 8 * 128;
    return kSwizzle128 << 62 | (kGroupOfRows >> 4) << 32 | lower;
  }

  // Waits for the next stage and starts to multiply it.
  __device__ void start(uint32_t (&acc)[kSums]) {
    wait_for_barrier(barriers_ + 16 * ring_.stage, ring_.parity);
    const uint32_t rows = rows_ + ring_.stage * (Tile::kRowBytes >> 4);
    const uint32_t columns = columns_ + ring_.stage * (Tile::kColumnBytes >> 4);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < Tile::kK / 32; ++i) {
      multiply_stage<Tile::kColumns>(acc, descriptor_of(rows + 2 * i),
                                     descriptor_of(columns + 2 * i),
                                     std::make_index_sequence<kSums>());
    }
    cute::warpgroup_commit_batch();
    ring_.step();
  }

  // Waits until at most kInFlight stages are being multiplied, and gives back the one before them.
  template <int kInFlight>
  __device__ void finish() {
    cute::warpgroup_wait<kInFlight>();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barriers_ + 16 * done_ + 8);
    done_ = done_ + 1 == Tile::kStages ? 0 : done_ + 1;
  }

  __device__ void multiply(uint32_t (&acc)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0;
    start(acc);
#pragma unroll 1
    for (int left = p_.steps - 1; left > 0; --left) {
      start(acc);
      finish<1>();
    }
    finish<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(acc[i]);
  }

  __device__ void store(const GroupedUnit& now, uint32_t (&acc)[kSums]) {
    Epilogue e = epilogue_of(p_.epilogue, now.expert, now.last);
    e.w_per_channel = true;  // what no expert has costs no code
    e.residual = nullptr;
    e.activation = Producer::kQuantize;
    const int row = static_cast<int>(threadIdx.x) / 32 * 16;  // of the tile: the warp's first
    if constexpr (Tile::kSwap) {
      store_swapped(e, acc, now.channel0 + row, now.token0);
    } else {
      int32_t sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = static_cast<int32_t>(acc[i]);
      store_tokens<Tile::kColumns / 8>(e, sums, now.token0 + row, now.channel0);
    }
  }

  // At most 32 tokens at a time, as in w4/wgmma_multiply.cuh: the sums move up.
  __device__ static void store_swapped(const Epilogue& e, uint32_t (&acc)[kSums], int channel,
                                       int token0) {
    constexpr int kPart = std::min(Tile::kTokens, 32), kPartSums = kPart / 2;
#pragma unroll 1
    for (int token = token0; token < token0 + Tile::kTokens; token += kPart) {
      if (token >= e.m) break;
      int32_t sums[kPartSums];
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sums[i] = static_cast<int32_t>(acc[i]);
      store_channels<kPart / 8>(e, sums, channel, token);
#pragma unroll
      for (int i = 0; i + kPartSums < kSums; ++i) acc[i] = acc[i + kPartSums];
    }
  }

  // Tokens of no expert are zeros; the blocks share them.
  __device__ void clear(int32_t first, int32_t last) const {
    const Epilogue& e = p_.epilogue;
    const auto size = visit_float(
        e.y_dtype, [](auto type) { return static_cast<int64_t>(sizeof(Element<decltype(type)>)); });
    const int64_t bytes = e.n * size;
    const int64_t whole = e.wide ? bytes / 16 * 16 : 0;
    for (int64_t token = first + int64_t{blockIdx.x}; token < last; token += gridDim.x) {
      int8_t* const row = static_cast<int8_t*>(e.y) + token * e.y_stride * size;
      for (int64_t at = 16 * threadIdx.x; at < whole; at += 16 * Tile::kConsumers) {
        *reinterpret_cast<int4*>(row + at) = make_int4(0, 0, 0, 0);
      }
      for (int64_t at = whole + 2 * threadIdx.x; at < bytes; at += 2 * Tile::kConsumers) {
        *reinterpret_cast<int16_t*>(row + at) = 0;
      }
    }
  }

  const GroupedWgmmaParams& p_;
  const uint32_t barriers_;
  const uint32_t rows_, columns_;  // the lower halves of descriptors
  StageRing<Tile::kStages> ring_;
  int done_ = 0;  // the oldest stage that was not given back
};

}  // namespace sqk
