// A cluster while it runs.
#pragma once
#include "exec.h"

namespace ptxsim {
struct RunningCluster {
  std::unique_ptr<Cluster> cluster;
  std::vector<std::pair<size_t, u8*>> memory;  // of shared memory, registers and local memory
  u64 last_progress = 0;                       // of the launch, when this cluster looked last
};

std::unique_ptr<RunningCluster> start_cluster(Launch& launch, Worker& worker, u64 linear_id);
// Runs a cluster for a while. Returns true when it has finished. alone: nothing else can release
// it.
bool run_cluster(RunningCluster& running, Worker& worker, bool alone, int max_rounds);
void end_cluster(RunningCluster& running, Worker& worker);

std::string thread_position(const Warp& warp, int lane);
// What happened, and where every warp of the cluster stands.
std::string deadlock_report(Cluster& cluster, const std::string& what);
}  // namespace ptxsim
