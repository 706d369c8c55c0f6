// A time slice of a warp: its diverged groups run one at a time, the one at the lowest pc first.
#include "schedule/slice.h"

#include "checks.h"
#include "schedule/groups.h"

namespace ptxsim {
void finish_bulk_copies(Warp& warp, u32 lanes, u32 keep, bool all);

namespace {
void exit_lanes(Warp& warp, u32 lanes) {
  finish_bulk_copies(warp, lanes, 0, true);
  Group& group = warp.groups[warp.current_group];
  warp.alive &= ~lanes;
  group.mask &= ~lanes;
  Cta& cta = *warp.cta;
  u32 count = (u32)__builtin_popcount(lanes);
  cta.exited += count;
  cta.cluster->exited += count;
  cta.cluster->progress++;
  if (!group.mask)
    remove_group(warp, warp.current_group);
  else
    group.pc++;
  for (int k = 0; k < warp.group_count; k++)
    if (warp.groups[k].state == kGroupCollecting)
      warp.groups[k].state = kGroupRunning;  // they may have waited for these lanes
  if (cta.exited == cta.threads) cta.done = true;
  release_barriers_after_exit(cta);
}

// Chooses the group that the slice starts with. Returns false when none can run.
bool choose_first_group(Slice& slice) {
  Warp& warp = slice.warp;
  int first;
  // Every fourth slice starts at the highest pc, so that a group that spins lets others run.
  if (warp.group_count > 1 && (++warp.rotate & 3) == 0) {
    first = highest_group(warp);
    slice.keep_group = true;
  } else
    first = lowest_group(warp);
  if (first < 0) {  // those that yielded have their turn again
    for (int k = 0; k < warp.group_count; k++) warp.groups[k].yielded = false;
    first = lowest_group(warp);
    if (first < 0) return false;
  }
  warp.current_group = first;
  merge_current(warp);
  return true;
}

// Chooses the group to go on with. Returns false when none can run.
bool choose_next_group(Slice& slice) {
  Warp& warp = slice.warp;
  merge_current(warp);
  if (slice.keep_group && can_run(slice.group())) return true;
  int next = lowest_group(warp);
  if (next < 0) return false;
  if (next != warp.current_group) {
    warp.current_group = next;
    merge_current(warp);
  }
  return true;
}

inline void execute(Warp& warp, const Instruction& instruction, u32 lanes, bool taint) {
  if (__builtin_expect(taint && !instruction.propagates_taint, 0))
    taint_generic(warp, instruction, lanes);
  instruction.handler(warp, instruction, lanes);
}

inline void step_branch(Slice& slice, const Instruction& instruction, u32 lanes) {
  Group& group = slice.group();
  if (lanes == group.mask) {
    group.pc = instruction.target;
    return;
  }
  split_group(slice.warp, lanes, instruction.target);
  group.pc++;
  slice.reschedule = true;
}

void step_try_wait(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  warp.failed_wait = false;
  if (slice.taint) taint_generic(warp, instruction, lanes);
  instruction.handler(warp, instruction, lanes);
  slice.group().pc++;
  if (warp.failed_wait) slice.yield_group();
}

void step(Slice& slice, const Instruction& instruction, u32 lanes) {
  switch (instruction.control) {
    case kNormal:  // run_slice has a shorter way
      return;
    case kBranch:
      return step_branch(slice, instruction, lanes);
    case kBranchIndexed:
      return step_branch_indexed(slice, instruction, lanes);
    case kExit:
      return step_exit(slice, instruction, lanes);
    case kCollect:
    case kWarpSync:
      return step_collect(slice, instruction, lanes);
    case kBarrier:
      return step_barrier(slice, instruction, lanes);
    case kClusterArrive:
      return step_cluster_arrive(slice, instruction, lanes);
    case kClusterWait:
      return step_cluster_wait(slice, instruction, lanes);
    case kTryWait:
      return step_try_wait(slice, instruction, lanes);
    case kWgmmaWait:
      return step_wgmma_wait(slice, instruction, lanes);
    case kGridWait:
      return step_grid_wait(slice, instruction, lanes);
    case kYield:
      slice.group().pc++;
      return slice.yield_group();
  }
}
}  // namespace

void step_branch_indexed(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  Group& group = slice.group();
  auto& targets = *(const std::vector<u32>*)instruction.aux;
  const u32* indices = warp.source<u32>(instruction.operands[0]);
  u32 rest = lanes, next = group.pc + 1;
  while (rest) {
    int first = __builtin_ctz(rest);
    u32 index = indices[first], same = 0;
    for_each_lane(rest, [&](int lane) {
      if (indices[lane] == index) same |= 1u << lane;
    });
    if (index >= targets.size())
      warp.fail(kErrorLaunch, first, format("brx.idx index %u is out of range", index));
    if (same == group.mask)
      group.pc = targets[index];
    else {
      split_group(warp, same, targets[index]);
      slice.reschedule = true;
    }
    rest &= ~same;
  }
  // lanes whose guard is false go on
  if (lanes != group.mask && group.mask && (group.mask & lanes) == 0) group.pc = next;
}

// Held lanes stay at the instruction, and execute it again when they are let go.
void step_grid_wait(Slice& slice, const Instruction&, u32 lanes) {
  Warp& warp = slice.warp;
  u32 others = slice.group().mask & ~lanes, next = slice.group().pc + 1;
  if (!warp.launch->holding) {
    warp.grid_waited |= lanes;
    warp.cta->grid_waited = true;
    slice.group().pc = next;
    return;
  }
  if (others) split_group(warp, others, next);
  slice.group().state = kGroupAtGridWait;
  warp.cta->cluster->progress++;
  slice.reschedule = true;
  slice.keep_group = false;
}

void step_exit(Slice& slice, const Instruction&, u32 lanes) {
  Warp& warp = slice.warp;
  u32 others = slice.group().mask & ~lanes;
  exit_lanes(warp, lanes);
  slice.reschedule = warp.group_count > 1;
  if (others) return;
  slice.keep_group = false;
  int next = lowest_group(warp);
  if (next < 0)
    slice.out_of_lanes = true;
  else
    warp.current_group = next;
}

SliceEnd run_slice(Warp& warp, int budget) {
  if (!warp.group_count) return kSliceDone;
  const Instruction* const code = warp.launch->kernel->code.data();
  const bool taint = taint_on(warp);
  Slice slice{warp, code, taint};
  Stats& stats = warp.worker->stats;
  if (!choose_first_group(slice)) return kSliceBlocked;
  while (budget-- > 0) {
    Group& group = slice.group();
    const Instruction& instruction = code[group.pc];
    u32 lanes = group.mask;
    warp.current = &instruction;
    if (instruction.predicate >= 0) {
      u32 guard = *(const u32*)(warp.registers + instruction.predicate);
      lanes &= instruction.predicate_negated ? ~guard : guard;
    }
    stats.warp_instructions[instruction.instruction_class]++;
    stats.thread_instructions += (u32)__builtin_popcount(lanes);
    slice.reschedule = warp.group_count > 1;
    if (instruction.control == kNormal) {
      if (lanes) execute(warp, instruction, lanes, taint);
      group.pc++;
      if (!slice.reschedule) continue;
    } else {
      if (__builtin_expect(taint, 0) && instruction.control == kBranch)
        taint_guard(warp, instruction, group.mask);
      if (lanes || instruction.control == kYield)
        step(slice, instruction, lanes);
      else
        group.pc++;
    }
    if (slice.out_of_lanes || (slice.reschedule && !choose_next_group(slice))) {
      if (!warp.group_count) return kSliceDone;
      return slice.spun ? kSliceSpin : kSliceBlocked;
    }
  }
  return kSliceBudget;
}
}  // namespace ptxsim
