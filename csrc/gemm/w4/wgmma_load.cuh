// The warp that requests the operands of Hopper's GEMM with weights of 4 bits (w4/wgmma.cuh).
// Kernel ring: no torch.
#pragma once

#include "common/memory_order.cuh"
#include "gemm/w4/wgmma_params.cuh"

namespace sqk {

template <class Tile>
class W4Loader {
 public:
  __device__ W4Loader(const W4WgmmaParams& p, uint32_t shared) : p_(p), shared_(shared) {}

  // By one thread: all of the block's units.
  __device__ void run(uint32_t units) {
    prefetch_map(p_.x);
    prefetch_map(p_.w);
    prefetch_map(p_.group);
    const uint32_t clusters = gridDim.x / Tile::kCluster;
    StageRing<Tile::kStages> ring;
    uint32_t unit = blockIdx.x / Tile::kCluster;
    // The weights of the first stages do not depend on the kernel before this one.
    W4Unit now = w4_unit<Tile>(p_, unit);
    const int ahead = p_.weights_first ? min(Tile::kStages, now.range.count) : 0;
    for (int i = 0; i < ahead; ++i) load_weights(now, i, i);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i, ring.step()) load_tokens(now, i, i);
    for (int i = ahead;; i = 0) {
      for (; i < now.range.count; ++i, ring.step()) {
        wait_for_barrier(empty(ring.stage), ring.parity ^ 1);
        load_weights(now, i, ring.stage);
        load_tokens(now, i, ring.stage);
      }
      unit += clusters;
      if (unit >= units) break;
      now = w4_unit<Tile>(p_, unit);
    }
    allow_next_kernel();
  }

 private:
  __device__ uint32_t full(int stage) const { return shared_ + Tile::kBarriersAt + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }

  __device__ void load_weights(const W4Unit& now, int i, int stage) {
    const int group = now.range.first + i;
    arrive_expecting(full(stage), Tile::kStageBytes);
    copy_box(shared_ + Tile::kWAt + stage * Tile::kWBytes, p_.w, group * static_cast<int>(kW4Bytes),
             now.channel0, full(stage));
    // Beyond n these are the next group's, whose results are never stored.
    copy_box(shared_ + Tile::kGroupAt + stage * Tile::kGroupBytes, p_.group,
             group * p_.epilogue.n + now.channel0, full(stage));
  }

  // Each block of a cluster loads its share of the tokens for all of them.
  __device__ void load_tokens(const W4Unit& now, int i, int stage) {
    const int k = (now.range.first + i) * static_cast<int>(kW4Group);
    const uint32_t to = shared_ + stage * Tile::kXBytes;
    if constexpr (Tile::kCluster == 1) {
      copy_box(to, p_.x, k, now.token0, full(stage));
    } else {
      constexpr int kShare = Tile::kTokens / Tile::kCluster;
      const int first = static_cast<int>(blockIdx.x % Tile::kCluster) * kShare;
      copy_box_to((1 << Tile::kCluster) - 1, to + first * static_cast<int>(kW4Group), p_.x, k,
                  now.token0 + first, full(stage));
    }
  }

  const W4WgmmaParams& p_;
  const uint32_t shared_;
};

}  // namespace sqk
