// The start and the end of a cluster: its CTAs, its warps and their memory.
#include "schedule/cluster.h"

#include "checks.h"

namespace ptxsim {
namespace {
u8* allocate_block(Worker& worker, size_t bytes) {
  for (size_t i = 0; i < worker.free_blocks.size(); i++)
    if (worker.free_blocks[i].first == bytes) {
      u8* block = worker.free_blocks[i].second;
      worker.free_blocks.erase(worker.free_blocks.begin() + (long)i);
      return block;
    }
  void* block = nullptr;
  if (posix_memalign(&block, 1024, bytes)) throw SimError(kErrorLoad, "out of memory");
  return (u8*)block;
}

// Memory that holds 0xff where nothing has been written, so that reads of it show.
u8* poisoned_memory(RunningCluster& running, Worker& worker, size_t bytes, size_t poisoned) {
  size_t rounded = bytes ? (bytes + 1023) / 1024 * 1024 : 1024;
  u8* block = allocate_block(worker, rounded);
  running.memory.push_back({rounded, block});
  memset(block, 0xff, poisoned);
  return block;
}

void place_cta(Cta& cta, Cluster& cluster, u32 rank) {
  const LaunchParams& params = cluster.launch->params;
  cta.cluster = &cluster;
  cta.rank = rank;
  cta.cluster_rank[0] = rank % params.cluster[0];
  cta.cluster_rank[1] = rank / params.cluster[0] % params.cluster[1];
  cta.cluster_rank[2] = rank / (params.cluster[0] * params.cluster[1]);
  for (int d = 0; d < 3; d++) cta.id[d] = cluster.id[d] * params.cluster[d] + cta.cluster_rank[d];
  cta.linear = cta.id[0] + params.grid[0] * (cta.id[1] + params.grid[1] * cta.id[2]);
  cta.threads = params.block[0] * params.block[1] * params.block[2];
}

void start_warp(Warp& warp, Cta& cta, Worker& worker, u32 id) {
  const Launch& launch = *cta.cluster->launch;
  const u32* block = launch.params.block;
  warp.constants = launch.kernel->constants;
  warp.cta = &cta;
  warp.launch = cta.cluster->launch;
  warp.worker = &worker;
  warp.id = (int)id;
  memset(warp.async_copy_group, 0, sizeof warp.async_copy_group);
  memset(warp.bulk_group, 0, sizeof warp.bulk_group);
  memset(warp.cluster_phase, 0, sizeof warp.cluster_phase);
  u32 left = cta.threads - id * 32;
  warp.alive = left >= 32 ? kFullMask : (1u << left) - 1;
  for (u32 lane = 0; lane < 32; lane++) {
    u32 thread = id * 32 + lane;
    warp.tid[0][lane] = thread % block[0];
    warp.tid[1][lane] = thread / block[0] % block[1];
    warp.tid[2][lane] = thread / (block[0] * block[1]);
  }
  warp.group_count = 1;
  warp.groups[0] = Group();
  warp.groups[0].mask = warp.alive;
}

void start_checks(Warp& warp, Cta& cta, size_t warps_of_cta, u32 id) {
  const Launch& launch = *warp.launch;
  if (launch.check_init) {
    warp.taint.assign(launch.kernel->register_bytes / 64 + 1, {0, 0});
    warp.local_init.assign((size_t)launch.kernel->local_bytes * 32, 0);
  }
  if (launch.check_race) {
    warp.clock.assign(cta.cluster->ctas.size() * warps_of_cta, 0);
    warp.clock[cta.rank * warps_of_cta + id] = 1;
  }
}

void start_cta(RunningCluster& running, Worker& worker, u32 rank) {
  Cluster& cluster = *running.cluster;
  const Launch& launch = *cluster.launch;
  const Kernel& kernel = *launch.kernel;
  Cta& cta = cluster.ctas[rank];
  place_cta(cta, cluster, rank);
  cta.shared_begin = kernel.shared_begin;
  cta.shared_end = kernel.shared_begin + kernel.static_shared + launch.params.dynamic_shared;
  cta.shared = poisoned_memory(running, worker, cta.shared_end + 1024, cta.shared_end);
  if (launch.check_init || launch.check_race) shadow_create(cta);
  size_t warps = (cta.threads + 31) / 32;
  size_t register_bytes = kernel.register_bytes, local_bytes = (size_t)kernel.local_bytes * 32;
  cta.warps.resize(warps);
  u8* registers = poisoned_memory(running, worker, register_bytes * warps, register_bytes * warps);
  u8* local = local_bytes
                  ? poisoned_memory(running, worker, local_bytes * warps, local_bytes * warps)
                  : nullptr;
  for (u32 id = 0; id < warps; id++) {
    Warp& warp = cta.warps[id];
    start_warp(warp, cta, worker, id);
    warp.registers = registers + register_bytes * id;
    warp.local = local ? local + local_bytes * id : nullptr;
    start_checks(warp, cta, warps, id);
  }
}
}  // namespace

std::unique_ptr<RunningCluster> start_cluster(Launch& launch, Worker& worker, u64 linear_id) {
  auto running = std::make_unique<RunningCluster>();
  running->cluster = std::make_unique<Cluster>();
  Cluster& cluster = *running->cluster;
  const u32* count = launch.cluster_count;
  const LaunchParams& params = launch.params;
  cluster.launch = &launch;
  cluster.id[0] = (u32)(linear_id % count[0]);
  cluster.id[1] = (u32)(linear_id / count[0] % count[1]);
  cluster.id[2] = (u32)(linear_id / ((u64)count[0] * count[1]));
  u32 ctas = params.cluster[0] * params.cluster[1] * params.cluster[2];
  cluster.ctas.resize(ctas);
  cluster.total = ctas * params.block[0] * params.block[1] * params.block[2];
  for (u32 rank = 0; rank < ctas; rank++) start_cta(*running, worker, rank);
  return running;
}

void end_cluster(RunningCluster& running, Worker& worker) {
  Launch& launch = *running.cluster->launch;
  for (auto& cta : running.cluster->ctas) {
    if (options().weak && !cta.weak.empty()) {
      std::lock_guard<std::mutex> lock(launch.mutex);
      launch.orphans.push_back(std::move(cta.weak));
    }
    if (cta.shadow) shadow_destroy(cta);
  }
  for (auto& block : running.memory) worker.free_blocks.push_back(block);
}
}  // namespace ptxsim
