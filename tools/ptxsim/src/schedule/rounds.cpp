// The rounds of a cluster: in each, every warp has a time slice, and asynchronous copies that are
// due complete. Rounds without progress end in a report of a deadlock.
#include "checks.h"
#include "schedule/cluster.h"
#include "schedule/slice.h"

namespace ptxsim {
namespace {
constexpr int kSliceInstructions = 4000;
// Under a seed, slices of random lengths show orders that long ones do not.
constexpr int kRandomSlices[] = {1, 2, 7, 40, 300, 4000, 4000, 4000};
constexpr int kIdleRounds = 20;  // after which another cluster has its turn
// Rounds in which every warp only spins.
constexpr u32 kSpinRoundsAlone = 3000, kSpinRounds = 100000;

struct Round {
  bool ran = false;       // a warp has run
  bool only_spun = true;  // all that ran were failing waits
  bool finished = true;   // no warp is left
  u64 instructions = 0;   // of warps
};

u64 count_instructions(const Worker& worker) {
  u64 sum = 0;
  for (int k = 0; k < kClasses; k++) sum += worker.stats.warp_instructions[k];
  return sum;
}

// The warps that have not finished, under a seed in a random order.
std::vector<Warp*> order_warps(Cluster& cluster, Worker& worker) {
  std::vector<Warp*> order;
  for (auto& cta : cluster.ctas)
    for (auto& warp : cta.warps)
      if (warp.group_count) order.push_back(&warp);
  if (options().seed)
    for (size_t k = order.size(); k > 1; k--) std::swap(order[k - 1], order[worker.random((u32)k)]);
  return order;
}

[[noreturn]] void fail_in_warp(const Warp& warp, const SimError& error) {
  const Kernel& kernel = *warp.launch->kernel;
  const u32* block = warp.cta->id;
  u32 mask = warp.groups[warp.current_group].mask;
  int lane = error.lane >= 0 ? error.lane : __builtin_ctz(mask ? mask : 1);
  std::string message = error.what();
  if (warp.current) message += "\n    at " + kernel.where((u32)(warp.current - kernel.code.data()));
  message += format("\n    block (%u,%u,%u) thread %s (warp %d lane %d)", block[0], block[1],
                    block[2], thread_position(warp, lane).c_str(), warp.id, lane);
  throw SimError(error.kind, message);
}

Round run_round(Cluster& cluster, Worker& worker) {
  Round round;
  u64 before = count_instructions(worker);
  std::vector<Warp*> order = order_warps(cluster, worker);
  if (options().weak)
    for (auto& cta : cluster.ctas)
      if (!cta.weak.empty() && !worker.random(256)) weak_some(worker, cta.weak);
  for (Warp* warp : order) {
    if (!warp->group_count) continue;
    round.finished = false;
    int budget = options().seed ? kRandomSlices[worker.random(8)] : kSliceInstructions;
    SliceEnd end;
    try {
      end = run_slice(*warp, budget);
    } catch (SimError& error) {
      fail_in_warp(*warp, error);
    }
    if (end != kSliceBlocked) round.ran = true;
    if (end == kSliceBudget || end == kSliceDone) round.only_spun = false;
  }
  round.instructions = count_instructions(worker) - before;
  worker.sequence += round.instructions;
  cluster.round++;
  return round;
}

// Completes the asynchronous copies that are due; one that is not when nothing else can go on.
// Returns whether there was any.
bool complete_copies(Cluster& cluster, const Round& round, u64 progress_before) {
  bool any = false;
  auto due = [&] { return cluster.async.front().first <= cluster.round; };
  while (!cluster.async.empty() &&
         (due() || ((!round.ran || round.only_spun) && cluster.progress == progress_before))) {
    auto complete = std::move(cluster.async.front().second);
    cluster.async.pop_front();
    complete();
    any = true;
    cluster.progress++;
    if (cluster.async.empty() || !due()) break;
  }
  return any;
}

[[noreturn]] void fail_with_report(Cluster& cluster, const std::string& what) {
  throw SimError(kErrorDeadlock, deadlock_report(cluster, what));
}

// After a round without progress: throws when the cluster can never go on.
void detect_deadlock(RunningCluster& running, const Round& round, bool alone) {
  Cluster& cluster = *running.cluster;
  if (!round.ran) fail_with_report(cluster, "deadlock: no warp of the cluster can go on");
  u64 launch_progress = cluster.launch->progress.load(std::memory_order_relaxed);
  if (launch_progress != running.last_progress) {  // another cluster may release this one
    running.last_progress = launch_progress;
    cluster.since_progress = 0;
  }
  cluster.since_progress += round.instructions;
  cluster.idle_rounds = round.only_spun ? cluster.idle_rounds + 1 : 0;
  if (cluster.idle_rounds > (alone ? kSpinRoundsAlone : kSpinRounds))
    fail_with_report(cluster,
                     "deadlock: every warp is blocked or spins on an mbarrier that nothing can "
                     "complete");
  if (cluster.since_progress > options().spin_limit)
    fail_with_report(cluster, format("livelock: no store, barrier or exit during %llu warp "
                                     "instructions (PTXSIM_SPIN_LIMIT)",
                                     (unsigned long long)cluster.since_progress));
}
}  // namespace

bool run_cluster(RunningCluster& running, Worker& worker, bool alone, int max_rounds) {
  Cluster& cluster = *running.cluster;
  Launch& launch = *cluster.launch;
  int idle = 0;
  for (int count = 0; alone || count < max_rounds; count++) {
    if (launch.failed.load(std::memory_order_relaxed)) return true;
    u64 progress_before = cluster.progress;
    Round round = run_round(cluster, worker);
    if (round.finished && cluster.async.empty()) return true;
    bool completed = complete_copies(cluster, round, progress_before);
    if (round.finished) continue;
    if (completed || cluster.progress != progress_before) {
      cluster.idle_rounds = 0;
      cluster.since_progress = 0;
      idle = 0;
      launch.progress.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    if (!launch.holding) detect_deadlock(running, round, alone);
    if (++idle > kIdleRounds) return false;
  }
  return false;
}
}  // namespace ptxsim
