// Barriers of a CTA and of a cluster.
#include "checks.h"
#include "schedule/groups.h"
#include "schedule/slice.h"

namespace ptxsim {
namespace {
enum BarrierKind { kSync, kArrive, kReduce };  // Instruction::imm
enum Reduction { kCount, kAnd };               // Instruction::imm2; else: or

u32 true_lanes(const Warp& warp, const Instruction& instruction, u32 lanes) {
  if (instruction.predicate < 0) return lanes;
  u32 guard = *(const u32*)(warp.registers + instruction.predicate);
  return lanes & (instruction.predicate_negated ? ~guard : guard);
}

void write_reduction(Warp& warp, const Barrier& barrier, const Instruction& instruction,
                     u32 lanes) {
  if (instruction.imm2 == kCount) {
    u32* destination = warp.destination<u32>(instruction.operands[0]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = barrier.reduced_count; });
    return;
  }
  bool value = instruction.imm2 == kAnd ? barrier.reduced_and : barrier.reduced_or;
  write_predicate(warp, instruction.operands[0], value ? kFullMask : 0, lanes);
}

void release_barrier(Cta& cta, u32 id) {
  Barrier& barrier = cta.barriers[id];
  const Launch& launch = *cta.cluster->launch;
  for (auto& warp : cta.warps)
    for (int k = 0; k < warp.group_count; k++) {
      Group& group = warp.groups[k];
      if (group.state != kGroupAtBarrier || group.aux != id) continue;
      const Instruction& instruction = launch.kernel->code[group.pc];
      if (instruction.imm == kReduce)
        write_reduction(warp, barrier, instruction, true_lanes(warp, instruction, group.mask));
      group.state = kGroupRunning;
      group.pc++;
      if (launch.check_race) {
        clock_acquire(warp, barrier.clock);
        warp.sync_epoch++;
      }
    }
  barrier.arrived = barrier.expected = 0;
  barrier.reduced_count = barrier.reduced_or = 0;
  barrier.reduced_and = 1;
  barrier.clock.clear();
  cta.cluster->progress++;
}

void release_if_full(Cta& cta, u32 id) {
  Barrier& barrier = cta.barriers[id];
  if (!barrier.arrived) return;
  bool full = barrier.expected ? barrier.arrived >= barrier.expected
                               : barrier.arrived + cta.exited >= cta.threads;
  if (full) release_barrier(cta, id);
}

void release_cluster_if_full(Cluster& cluster) {
  if (!cluster.barrier_arrived || cluster.barrier_arrived + cluster.exited < cluster.total) return;
  cluster.barrier_arrived = 0;
  cluster.barrier_phase++;
  cluster.progress++;
  for (auto& cta : cluster.ctas)
    for (auto& warp : cta.warps)
      for (int k = 0; k < warp.group_count; k++)
        if (warp.groups[k].state == kGroupAtClusterBarrier) warp.groups[k].state = kGroupRunning;
}

// The id and the thread count of bar and barrier: every lane has the same.
struct BarrierOperands {
  u32 id, count;
};
BarrierOperands barrier_operands(Warp& warp, const Instruction& instruction, u32 lanes) {
  const i32* operands = instruction.operands + (instruction.imm == kReduce ? 1 : 0);
  const u32 *ids = warp.source<u32>(operands[0]), *counts = warp.source<u32>(operands[1]);
  int first = __builtin_ctz(lanes);
  u32 id = ids[first], count = counts[first];
  for_each_lane(lanes, [&](int lane) {
    if (ids[lane] != id || counts[lane] != count)
      warp.fail(kErrorLaunch, lane, "barrier operands differ between the lanes of a warp");
  });
  return {id, count};
}

void check_barrier(Warp& warp, const BarrierOperands& operands, int lane) {
  auto [id, count] = operands;
  auto fail = [&](const std::string& message) { warp.fail(kErrorLaunch, lane, message); };
  if (id > 15) fail(format("barrier number %u is out of range (0..15)", id));
  const Cta& cta = *warp.cta;
  const Barrier& barrier = cta.barriers[id];
  if (count % 32)
    fail(format("barrier %u: thread count %u is not a multiple of the warp size", id, count));
  if (count > ((cta.threads + 31) / 32) * 32)
    fail(format("barrier %u expects %u threads but the CTA has only %u", id, count, cta.threads));
  if (barrier.arrived && barrier.expected != count)
    fail(format("barrier %u is used with different thread counts at once (%u and %u)", id,
                barrier.expected, count));
}

// Arrives at a barrier with the lanes of the current group. Returns false when the group now waits.
bool arrive(Warp& warp, Group& group, const Instruction& instruction, u32 lanes) {
  BarrierOperands operands = barrier_operands(warp, instruction, lanes);
  int first = __builtin_ctz(lanes);
  check_barrier(warp, operands, first);
  auto [id, count] = operands;
  Barrier& barrier = warp.cta->barriers[id];
  barrier.expected = count;
  barrier.arrived += count && instruction.aligned ? 32 : (u32)__builtin_popcount(lanes);
  if (count && barrier.arrived > count)
    warp.fail(kErrorLaunch, first,
              format("barrier %u: more threads arrived (%u) than expected (%u)", id,
                     barrier.arrived, count));
  if (instruction.imm == kReduce) {
    u32 value = read_predicate(warp, instruction.operands[3]) & lanes;
    barrier.reduced_count += (u32)__builtin_popcount(value);
    barrier.reduced_and &= value == lanes;
    barrier.reduced_or |= value != 0;
  }
  if (options().weak) weak_ordered(warp, lanes);
  if (warp.launch->check_race) clock_release(warp, barrier.clock);
  if (instruction.imm == kArrive)
    group.pc++;
  else {
    group.state = kGroupAtBarrier;
    group.aux = id;
  }
  warp.cta->cluster->progress++;
  release_if_full(*warp.cta, id);
  return instruction.imm == kArrive || group.state == kGroupRunning;
}
}  // namespace

void release_barriers_after_exit(Cta& cta) {
  for (u32 id = 0; id < 16; id++)
    if (cta.barriers[id].arrived && !cta.barriers[id].expected) release_if_full(cta, id);
  release_cluster_if_full(*cta.cluster);
}

void step_barrier(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  Group& group = slice.group();
  u32 others = group.mask & ~lanes, next = group.pc + 1;
  bool diverged = instruction.aligned && lanes != warp.alive;
  if (diverged) slice.collect(warp.alive);
  if (others) {  // lanes whose guard is false go on
    split_group(warp, others, next);
    slice.reschedule = true;
  }
  if (!diverged && !arrive(warp, group, instruction, lanes)) slice.reschedule = true;
}

void step_cluster_arrive(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  if (instruction.aligned && lanes != warp.alive) {
    slice.collect(warp.alive);
    return;
  }
  Cluster& cluster = *warp.cta->cluster;
  for_each_lane(lanes, [&](int lane) {
    if ((warp.cluster_arrived >> lane) & 1)
      warp.fail(kErrorLaunch, lane, "barrier.cluster.arrive twice without a wait in between");
    warp.cluster_phase[lane] = cluster.barrier_phase;
    warp.cluster_arrived |= 1u << lane;
  });
  cluster.barrier_arrived += (u32)__builtin_popcount(lanes);
  cluster.progress++;
  if (warp.launch->check_race) clock_release(warp, cluster.barrier_clock);
  slice.group().pc++;
  release_cluster_if_full(cluster);
}

void step_cluster_wait(Slice& slice, const Instruction&, u32 lanes) {
  Warp& warp = slice.warp;
  Cluster& cluster = *warp.cta->cluster;
  bool complete = true;
  for_each_lane(lanes, [&](int lane) {
    if (!((warp.cluster_arrived >> lane) & 1))
      warp.fail(kErrorLaunch, lane, "barrier.cluster.wait without a prior arrive");
    if (cluster.barrier_phase == warp.cluster_phase[lane]) complete = false;
  });
  if (!complete) {
    slice.group().state = kGroupAtClusterBarrier;
    slice.reschedule = true;
    return;
  }
  warp.cluster_arrived &= ~lanes;
  slice.group().pc++;
  if (warp.launch->check_race) {
    clock_acquire(warp, cluster.barrier_clock);
    warp.sync_epoch++;
  }
}
}  // namespace ptxsim
