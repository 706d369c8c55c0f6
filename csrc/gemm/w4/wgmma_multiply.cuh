// The warps that unpack, multiply and store in Hopper's GEMM with weights of 4 bits (w4/wgmma.cuh).
// Kernel ring: no torch.
#pragma once

#include <algorithm>
#include <utility>

#include "common/memory_order.cuh"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "gemm/epilogue/channels.cuh"
#include "gemm/w4/unpack.cuh"
#include "gemm/w4/wgmma_params.cuh"

namespace sqk {

template <int kTokens>
struct W4Atom;
#define SQK_ATOM(tokens)                                               \
  template <>                                                          \
  struct W4Atom<tokens> {                                              \
    using Type = cute::SM90::GMMA::MMA_64x##tokens##x32_S32S8S8_RS_TN; \
  };
SQK_ATOM(16)
SQK_ATOM(32)
SQK_ATOM(64)
SQK_ATOM(128)
SQK_ATOM(256)
#undef SQK_ATOM

// acc[64 channels, tokens] += a[64, 32 of k] * the tokens' 32 of k at `descriptor`.
template <int kTokens, size_t... kAt>
__device__ inline void multiply_tokens(uint32_t (&acc)[kTokens / 2], const uint32_t (&a)[4],
                                       uint64_t descriptor, std::index_sequence<kAt...>) {
  W4Atom<kTokens>::Type::fma(a[0], a[1], a[2], a[3], descriptor, acc[kAt]...);
}

template <class Tile>
class W4Consumer {
 public:
  static constexpr int kSums = Tile::kTokens / 2;  // of a thread

  __device__ W4Consumer(const W4WgmmaParams& p, uint32_t shared, const uint8_t* stages)
      : p_(p), barriers_(shared + Tile::kBarriersAt), descriptor_(1u << 16 | shared >> 4) {
    const int lane = threadIdx.x % 32;
    warp_channel_ = static_cast<int>(threadIdx.x) / 32 * 16;
    weights_ = stages + Tile::kWAt + warp_channel_ * kW4Bytes + lane * 16;
    groups_ = stages + Tile::kGroupAt + 2 * (warp_channel_ + lane / 4);
  }

  __device__ void run(uint32_t units) {
    const uint32_t clusters = gridDim.x / Tile::kCluster;
    for (uint32_t unit = blockIdx.x / Tile::kCluster; unit < units; unit += clusters) {
      const W4Unit now = w4_unit<Tile>(p_, unit);
      uint32_t acc[kSums];
      multiply(now.range.count, acc);
      if (p_.splits > 1 && !combine(now, acc)) continue;
      store(now, acc);
    }
  }

 private:
  // The words of a lane in four instructions of 32 of k.
  using Fragments = uint32_t[4][4];

  // Rows of 128 bytes in groups of eight, with their pieces XORed as TMA leaves them. The address
  // counts in units of 16 bytes and is the lowest part, so a sum of the lower halves is enough.
  __device__ static uint64_t descriptor_of(uint32_t lower) {
    constexpr uint64_t kSwizzle128 = 1, kGroupOfRows = 8 * 128;
    return kSwizzle128 << 62 | (kGroupOfRows >> 4) << 32 | lower;
  }

  // Waits for the next stage and unpacks its weights.
  __device__ void unpack(Fragments& a) {
    const int stage = ring_.stage;
    wait_for_barrier(barriers_ + 16 * stage, ring_.parity);
#pragma unroll
    for (int h = 0; h < 2; ++h) {         // the lane's channels: 8 apart
      constexpr uint32_t kSign = 0x8000;  // adds 128 to the offset
      const uint32_t element =
          *reinterpret_cast<const uint16_t*>(groups_ + stage * Tile::kGroupBytes + 16 * h);
      const W4Scale scale = W4Scale::of<0>(element ^ kSign);
      const uint4 v = *reinterpret_cast<const uint4*>(weights_ + stage * Tile::kWBytes +
                                                      8 * static_cast<int>(kW4Bytes) * h);
      const uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack_w4(words[i], scale, a[i][h], a[i][2 + h]);
    }
  }

  // Starts to multiply the stage that was unpacked last.
  __device__ void start(const Fragments& a, uint32_t (&acc)[kSums]) {
    const uint32_t stage = descriptor_ + ring_.stage * (Tile::kXBytes >> 4);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_tokens<Tile::kTokens>(acc, a[i], descriptor_of(stage + 2 * i),
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
    if (threadIdx.x % 32 < Tile::kCluster) {
      const uint32_t barrier = barriers_ + 16 * done_ + 8;
      if constexpr (Tile::kCluster == 1) {
        arrive(barrier);
      } else {
        arrive_in(barrier, threadIdx.x % 32);  // every block has written to this stage
      }
    }
    done_ = done_ + 1 == Tile::kStages ? 0 : done_ + 1;
  }

  // While the stages of one set of registers are multiplied, the other one receives the next stage.
  __device__ void multiply(int count, uint32_t (&acc)[kSums]) {
    Fragments a, b;
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0;
    unpack(a);
    start(a, acc);
#pragma unroll 1
    for (int left = count - 1; left > 0; left -= 2) {
      unpack(b);
      start(b, acc);
      finish<1>();
      if (left == 1) break;
      unpack(a);
      start(a, acc);
      finish<1>();
    }
    finish<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(acc[i]);
  }

  // Adds up the sums of the blocks that share a tile; true for the one block that then has the
  // total. As combine_splits of mma/kernel.cuh, for these warps alone.
  __device__ bool combine(const W4Unit& now, uint32_t (&acc)[kSums]) {
    constexpr int kWords = kSums / 4;
    const int64_t words = int64_t{kWords} * Tile::kConsumers;
    const int64_t tiles = int64_t{p_.m_tiles} * p_.n_clusters * Tile::kCluster;
    int4* const slot = p_.partials + (now.split * tiles + now.tile) * words + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t* sum = acc + 4 * i;
      __stcg(slot + i * Tile::kConsumers,
             make_int4(static_cast<int>(sum[0]), static_cast<int>(sum[1]), static_cast<int>(sum[2]),
                       static_cast<int>(sum[3])));
    }
    sync_consumers(false);
    bool last = false;
    if (threadIdx.x == 0) {
      fence_gpu();
      last = atomicAdd(p_.tickets + now.tile, 1u) + 1 == p_.splits;
      fence_gpu();
      if (last) p_.tickets[now.tile] = 0;  // for the next launch
    }
    if (!sync_consumers(last)) return false;
#pragma unroll 1
    for (int other = 0; other < p_.splits; ++other) {
      if (other == static_cast<int>(now.split)) continue;
      const int4* theirs = p_.partials + (other * tiles + now.tile) * words + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int4 sum = load_fresh(theirs + i * Tile::kConsumers);
        acc[4 * i] += static_cast<uint32_t>(sum.x);
        acc[4 * i + 1] += static_cast<uint32_t>(sum.y);
        acc[4 * i + 2] += static_cast<uint32_t>(sum.z);
        acc[4 * i + 3] += static_cast<uint32_t>(sum.w);
      }
    }
    return true;
  }

  // A barrier of the warps that multiply. Whether any thread said yes.
  __device__ static bool sync_consumers(bool yes) {
    uint32_t any;
    asm volatile(
        "{\n"
        ".reg .pred mine, all;\n"
        "setp.ne.u32 mine, %1, 0;\n"
        "barrier.cta.red.or.pred.aligned all, 1, %2, mine;\n"
        "selp.u32 %0, 1, 0, all;\n"
        "}"
        : "=r"(any)
        : "r"(static_cast<uint32_t>(yes)), "n"(Tile::kConsumers)
        : "memory");
    return any != 0;
  }

  // At most 32 tokens at a time: the scales of more would not fit the registers beside the sums.
  // These move up, because registers cannot be indexed at run time, and unrolling would repeat the
  // long epilogue.
  __device__ void store(const W4Unit& now, uint32_t (&acc)[kSums]) {
    constexpr int kPart = std::min(Tile::kTokens, 32), kPartSums = kPart / 2;
    const int channel = now.channel0 + warp_channel_;
#pragma unroll 1
    for (int token = now.token0; token < now.token0 + Tile::kTokens; token += kPart) {
      if (token >= p_.epilogue.m) break;
      int32_t sums[kPartSums];
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sums[i] = static_cast<int32_t>(acc[i]);
      store_channels<kPart / 8>(p_.epilogue, sums, channel, token);
#pragma unroll
      for (int i = 0; i + kPartSums < kSums; ++i) acc[i] = acc[i + kPartSums];
    }
  }

  const W4WgmmaParams& p_;
  const uint32_t barriers_;
  const uint32_t descriptor_;  // its lower half
  const uint8_t* weights_;
  const uint8_t* groups_;
  int warp_channel_;
  StageRing<Tile::kStages> ring_;
  int done_ = 0;  // the oldest stage that was not given back
};

}  // namespace sqk
