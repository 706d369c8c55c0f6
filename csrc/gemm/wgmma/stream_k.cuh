// CUTLASS's stream-K schedule with tickets that are 0 after every launch (common/tickets.h), where
// CUTLASS clears them before each launch. Kernel ring: no torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/memory_order.cuh"
#include "common/tickets.h"
#include "cutlass/arch/barrier.h"
#include "cutlass/barrier.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

namespace sqk {

// The tag by which a kernel names this schedule, as cutlass::gemm::StreamKScheduler names
// CUTLASS's.
struct StreamKWithTickets {};

// Two warpgroups have a ticket each for every tile that is shared, which are those of the last one
// or two waves.
constexpr int64_t stream_k_tickets(int64_t tiles, int64_t sms) {
  return 2 * std::min(tiles, 2 * sms);
}

// The launch's tickets, for the block's threads. CUTLASS calls what waits for tickets without an
// object, so their address has to be where every thread can read it: in the last bytes of the
// block's dynamic memory. Static memory would come first, and TMA's buffers would not be aligned.
constexpr int kKeptBytes = 16;
__device__ inline uint32_t*& kept_tickets() {
  extern __shared__ char shared[];
  uint32_t size;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(size));
  return *reinterpret_cast<uint32_t**>(shared + size - kKeptBytes);
}
__device__ inline void keep_tickets(uint32_t* tickets) {
  if (threadIdx.x == 0) kept_tickets() = tickets;
  __syncthreads();
}

// Passes CUTLASS's waits on to the launch's tickets. nullptr: those in the workspace.
template <uint32_t kThreads>
struct TicketBarriers {
  static constexpr auto kFirst =
      static_cast<uint32_t>(cutlass::arch::ReservedNamedBarriers::StreamkBarrier0);
  using Barriers = cutlass::NamedBarrierManager<kThreads, kFirst, 2>;
  static constexpr uint32_t ThreadCount = kThreads;

  __device__ static void* place(void* in_workspace) {
    uint32_t* const tickets = kept_tickets();
    return tickets != nullptr ? tickets : in_workspace;
  }
  __device__ static void wait_eq(uint32_t barrier, void* locks, int thread, int at, int value) {
    Barriers::wait_eq(barrier, place(locks), thread, at, value);
  }
  __device__ static void wait_lt(uint32_t barrier, void* locks, int thread, int at, int count) {
    Barriers::wait_lt(barrier, place(locks), thread, at, count);
  }
  __device__ static void arrive_inc(uint32_t barrier, void* locks, int thread, int at, int value) {
    Barriers::arrive_inc(barrier, place(locks), thread, at, value);
  }
};

template <class TileShape, class ClusterShape>
class StreamKTickets
    : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<TileShape,
                                                                               ClusterShape> {
  using Base =
      cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<TileShape, ClusterShape>;
  static constexpr uint32_t kThreads = cutlass::NumThreadsPerWarpGroup;

 public:
  using Base::Base;
  using typename Base::Params;
  using typename Base::WorkTileInfo;

  // Only a hint that lets the next kernel start early, and CUTLASS 4.2's own does not compile for
  // this schedule. The next kernel starts when the blocks end.
  CUTLASS_DEVICE bool is_last_tile(const WorkTileInfo&, uint32_t = 1) const { return false; }

  // Adds up the parts of a tile. The block that has its end waits until the tickets of all others
  // have been taken, and none is taken after that: it can reset them. The thread that has waited
  // does, so its reset comes after its wait.
  template <class Accumulators>
  CUTLASS_DEVICE static void fixup(const Params& params, const WorkTileInfo& work,
                                   Accumulators& accumulators, uint32_t barriers,
                                   uint32_t barrier) {
    // Each thread waits here too: a part of a tile may have no loads that could be waited for.
    wait_for_previous_kernel();
    Base::template fixup_helper<Accumulators, TicketBarriers<kThreads>>(params, work, accumulators,
                                                                        barriers, barrier);
    uint32_t* const tickets = kept_tickets();
    if (tickets != nullptr && Base::requires_fixup(params, work) &&
        Base::compute_epilogue(work, params) && threadIdx.x % kThreads == 0) {
      tickets[Base::output_tile_index(params, work) * barriers + barrier] = 0;
    }
  }
};

}  // namespace sqk

// CUTLASS finds a schedule by its tag.
namespace cutlass::gemm::kernel::detail {
template <class TileShape, class ClusterShape, uint32_t kStages>
struct TileSchedulerSelector<sqk::StreamKWithTickets, arch::Sm90, TileShape, ClusterShape,
                             kStages> {
  using Scheduler = sqk::StreamKTickets<TileShape, ClusterShape>;
};
}  // namespace cutlass::gemm::kernel::detail
