// CTAs and clusters.
#pragma once
#include <deque>
#include <functional>

#include "state/warp.h"

namespace ptxsim {
struct Cluster;

struct Barrier {
  u32 arrived = 0, expected = 0;  // threads; expected 0: all of the CTA
  u32 reduced_count = 0, reduced_and = 1, reduced_or = 0;
  std::vector<u32> clock;
};

// Shadow of shared memory: the state of each byte.
struct SharedShadow {
  std::vector<u8> init;
};

struct Cta {
  WeakMap weak;  // global stores that other CTAs do not see yet
  Cluster* cluster = nullptr;
  u32 id[3], rank = 0, linear = 0, cluster_rank[3];
  u8* shared = nullptr;  // indexed by address; [shared_begin, shared_end) is valid
  u32 shared_begin = 0, shared_end = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  u32 threads = 0, exited = 0;
  bool done = false;         // every thread has exited
  bool grid_waited = false;  // a thread has passed griddepcontrol.wait
  SharedShadow* shadow = nullptr;
};

struct Cluster {
  Launch* launch = nullptr;
  u32 id[3];
  std::vector<Cta> ctas;
  u32 barrier_arrived = 0, barrier_phase = 0, exited = 0, total = 0;  // threads
  std::vector<u32> barrier_clock;
  u64 progress = 0;        // events that can release a waiting warp
  u64 since_progress = 0;  // instructions since the last one
  u64 round = 0;
  u32 idle_rounds = 0;                                      // in a row, in which warps only spun
  std::deque<std::pair<u64, std::function<void()>>> async;  // round in which it is due, action
};
}  // namespace ptxsim
