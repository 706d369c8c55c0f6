// A launch and the threads of the host that work on it.
#pragma once
#include <atomic>
#include <mutex>

#include "memory/allocations.h"
#include "state/kernel.h"
#include "state/statistics.h"
#include "state/weak_memory.h"

namespace ptxsim {
struct LaunchParams {
  u32 grid[3], block[3], cluster[3] = {1, 1, 1};
  u32 dynamic_shared = 0;
  bool cooperative = false;
  bool overlap = false;
  std::vector<u8> params;
};

struct Launch {
  Kernel* kernel = nullptr;
  LaunchParams params;
  std::shared_ptr<const AllocationMap> allocations;
  u64 param_base = 0, param_size = 0;
  u64 grid_workspace = 0;  // of a cooperative launch: its blocks count their arrivals here
  u32 cluster_count[3];
  u64 total = 0;  // clusters
  std::atomic<u64> next{0};
  std::atomic<bool> failed{false};
  std::atomic<u64> progress{0};
  std::mutex mutex;
  std::vector<WeakMap> orphans;  // stores of CTAs that have exited
  u64 permute_factor = 1, permute_offset = 0;
  bool holding = false;          // PTXSIM_OVERLAP: griddepcontrol.wait lets nobody pass
  bool triggered_early = false;  // griddepcontrol.launch_dependents before the wait
  std::map<u64, u8> written;     // PTXSIM_OVERLAP: bytes before the launch's first store to them
  Stats stats;
  bool stats_on = false, check_init = false, check_race = false;
  std::string error;
  ErrorKind error_kind = kErrorLaunch;
};
void run_launch(Launch& launch);

// A thread of the host.
struct Worker {
  Stats stats;
  u64 random_state = 0;
  u32 random(u32 bound) {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (u32)((random_state >> 20) % bound);
  }
  // The allocation of the last access. Accesses in [cached_begin, cached_begin + cached_size) need
  // no further check.
  const Allocation* last_allocation = nullptr;
  u64 cached_begin = 1, cached_size = 0;
  u64 sequence = 0;                                 // instructions so far: the clock
  std::vector<std::pair<size_t, u8*>> free_blocks;  // memory of clusters that have ended
};
}  // namespace ptxsim
