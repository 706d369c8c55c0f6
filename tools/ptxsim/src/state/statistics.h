// What is counted during a launch.
#pragma once
#include "state/instruction.h"

namespace ptxsim {
struct Stats {
  u64 warp_instructions[kClasses] = {};
  u64 thread_instructions = 0;
  u64 load_bytes = 0, store_bytes = 0, load_sectors = 0, store_sectors = 0, load_requests = 0,
      store_requests = 0, load_ideal_sectors = 0, store_ideal_sectors = 0;
  u64 shared_wavefronts = 0, shared_ideal_wavefronts = 0, shared_requests = 0;
  u64 tma_load_bytes = 0, tma_store_bytes = 0, bulk_bytes = 0, cp_async_bytes = 0;
  u64 mma_macs = 0, wgmma_macs = 0;
  void add(const Stats& other) {  // every member is a u64
    const u64* from = (const u64*)&other;
    u64* to = (u64*)this;
    for (size_t i = 0; i < sizeof(Stats) / sizeof(u64); i++) to[i] += from[i];
  }
};

void count_shared_request(Warp& warp, const u64* addresses, u32 lanes, u32 bytes);
}  // namespace ptxsim
