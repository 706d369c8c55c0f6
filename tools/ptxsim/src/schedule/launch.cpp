// A launch: its clusters are spread over the worker threads; each worker runs several in turns.
#include <algorithm>
#include <numeric>
#include <thread>

#include "checks/overlap.h"
#include "schedule/cluster.h"

namespace ptxsim {
namespace {
constexpr u64 kGoldenRatio = 0x9e3779b97f4a7c15ull, kMultiplier = 0xd1342543de82ef95ull;

// Under a seed the clusters start in a random order.
u64 permuted(const Launch& launch, u64 index) {
  return (index * launch.permute_factor + launch.permute_offset) % launch.total;
}
std::unique_ptr<RunningCluster> start_next(Launch& launch, Worker& worker) {
  u64 index = launch.next.fetch_add(1);
  if (index >= launch.total) return nullptr;
  return start_cluster(launch, worker, permuted(launch, index));
}

int rounds_of_turn(const Launch& launch, Worker& worker) {
  if (options().seed) return 1 + (int)worker.random(40);
  return launch.params.cooperative ? 50 : 2000;
}

// PTXSIM_OVERLAP: what an early start does. Every cluster runs while memory is as it was before the
// kernel before, until its warps wait for that kernel or for each other.
void run_until_held(Launch& launch, Worker& worker,
                    std::deque<std::unique_ptr<RunningCluster>>& resident) {
  constexpr size_t kMostHeld = 1024;
  constexpr int kRounds = 100000;
  launch.holding = true;
  {
    EarlierMemory earlier(launch);
    while (resident.size() < kMostHeld && !launch.failed.load()) {
      auto started = start_next(launch, worker);
      if (!started) break;
      resident.push_back(std::move(started));
      if (!run_cluster(*resident.back(), worker, false, kRounds)) continue;
      check_waited(*resident.back()->cluster);
      end_cluster(*resident.back(), worker);
      resident.pop_back();
    }
  }
  launch.holding = false;
  for (auto& running : resident)
    for (auto& cta : running->cluster->ctas)
      for (auto& warp : cta.warps)
        for (int k = 0; k < warp.group_count; k++)
          if (warp.groups[k].state == kGroupAtGridWait) warp.groups[k].state = kGroupRunning;
}

// Runs clusters until none is left. A cluster that does not finish waits for others or takes long:
// another one is let in, up to a number that memory allows.
void run_clusters(Launch& launch, Worker& worker,
                  std::deque<std::unique_ptr<RunningCluster>>& resident) {
  size_t max_resident = launch.params.cooperative ? (size_t)launch.total : 256;
  while (!launch.failed.load()) {
    if (resident.empty()) {
      auto started = start_next(launch, worker);
      if (!started) break;
      resident.push_back(std::move(started));
    }
    RunningCluster& first = *resident.front();
    bool more = launch.next.load() < launch.total;
    bool alone = resident.size() == 1 && !more && options().threads == 1;
    bool finished = run_cluster(first, worker, alone, rounds_of_turn(launch, worker));
    if (options().weak && !worker.random(512)) {
      std::lock_guard<std::mutex> lock(launch.mutex);
      for (auto& orphan : launch.orphans) weak_some(worker, orphan);
    }
    if (finished) {
      if (!launch.failed.load()) check_waited(*first.cluster);
      end_cluster(first, worker);
      resident.pop_front();
      continue;
    }
    resident.push_back(std::move(resident.front()));
    resident.pop_front();
    if (resident.size() < max_resident)
      if (auto started = start_next(launch, worker)) resident.push_front(std::move(started));
  }
}

void record_failure(Launch& launch, ErrorKind kind, const char* message) {
  std::lock_guard<std::mutex> lock(launch.mutex);
  if (launch.failed.exchange(true)) return;
  launch.error = message;
  launch.error_kind = kind;
}

void run_worker(Launch& launch, Worker& worker) {
  std::deque<std::unique_ptr<RunningCluster>> resident;
  try {
    if (starts_early(launch)) run_until_held(launch, worker, resident);
    run_clusters(launch, worker, resident);
  } catch (SimError& error) {
    record_failure(launch, error.kind, error.what());
  } catch (std::exception& error) {
    record_failure(launch, kErrorLaunch, error.what());
  }
  for (auto& running : resident) end_cluster(*running, worker);
  std::lock_guard<std::mutex> lock(launch.mutex);
  launch.stats.add(worker.stats);
}

// The memory in which the blocks of a cooperative launch count their arrivals.
struct GridWorkspace {
  void* memory = nullptr;
  explicit GridWorkspace(bool cooperative) {
    if (!cooperative) return;
    memory = memory_allocate(256, "grid workspace");
    memset(memory, 0, 256);
  }
  ~GridWorkspace() {
    if (memory) memory_free(memory);
  }
};

void draw_permutation(Launch& launch, u64 launch_number) {
  u64 hash = (options().seed * kGoldenRatio) ^ (launch_number * kMultiplier);
  launch.permute_offset = (hash >> 8) % launch.total;
  u64 factor = (hash >> 20) % launch.total | 1;
  while (std::gcd(factor, launch.total) != 1) factor++;
  launch.permute_factor = factor;
}

// Workers live on: they keep their memory for the next launch.
std::vector<std::unique_ptr<Worker>>& worker_pool(u64 count) {
  static auto* pool = new std::vector<std::unique_ptr<Worker>>;
  while (pool->size() < count) pool->push_back(std::make_unique<Worker>());
  return *pool;
}
void reset_worker(Worker& worker, u64 index, u64 launch_number) {
  worker.stats = Stats();
  u64 seed = (options().seed + 1) * kGoldenRatio;
  worker.random_state = (seed ^ (launch_number * kMultiplier) ^ (index << 40)) | 1;
  worker.last_allocation = nullptr;
  worker.cached_begin = 1;
  worker.cached_size = 0;
}

void run_workers(Launch& launch, u64 launch_number) {
  u64 most = starts_early(launch) ? 1 : (u64)options().threads;
  u64 count = std::max<u64>(1, std::min<u64>(most, launch.total));
  auto& pool = worker_pool(count);
  for (u64 i = 0; i < count; i++) reset_worker(*pool[i], i, launch_number);
  std::vector<std::thread> threads;
  for (u64 i = 1; i < count; i++) threads.emplace_back([&, i] { run_worker(launch, *pool[i]); });
  run_worker(launch, *pool[0]);
  for (auto& thread : threads) thread.join();
}
}  // namespace

void run_launch(Launch& launch) {
  static std::atomic<u64> launches{0};
  const u64 launch_number = ++launches;
  GridWorkspace workspace(launch.params.cooperative);
  launch.grid_workspace = (u64)workspace.memory;
  launch.allocations = memory_snapshot();
  launch.stats_on = !options().stats_file.empty();
  launch.check_init = options().check_init;
  launch.check_race = options().check_race;
  for (int d = 0; d < 3; d++)
    launch.cluster_count[d] = launch.params.grid[d] / launch.params.cluster[d];
  launch.total = (u64)launch.cluster_count[0] * launch.cluster_count[1] * launch.cluster_count[2];
  // Kernel parameters live in host memory, 128-byte aligned because they may hold tensor maps.
  const std::vector<u8>& params = launch.params.params;
  std::vector<u8> storage(params.size() + 256, 0);
  launch.param_base = ((u64)storage.data() + 127) & ~127ull;
  launch.param_size = params.size();
  if (!params.empty()) memcpy((void*)launch.param_base, params.data(), params.size());
  if (options().seed) draw_permutation(launch, launch_number);
  run_workers(launch, launch_number);
  for (auto& orphan : launch.orphans) weak_apply(orphan);
  if (launch.failed) throw SimError(launch.error_kind, launch.error);
  if (options().overlap) remember_written(launch);
}
}  // namespace ptxsim
