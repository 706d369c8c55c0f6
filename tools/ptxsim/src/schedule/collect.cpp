// Instructions that the lanes of a warp execute together: the group waits until the lanes of the
// member mask stand here.
#include "checks.h"
#include "schedule/groups.h"
#include "schedule/slice.h"

namespace ptxsim {
namespace {
constexpr u32 kNoMask = 0xff;  // Instruction::imm2: every lane of the warp is a member

const u32* member_masks(const Warp& warp, const Instruction& instruction) {
  return warp.source<u32>(instruction.operands[instruction.imm2]);
}

// True when every lane of the member masks is among the lanes; needed: the lanes of all the masks.
bool all_stand_here(Warp& warp, const Instruction& instruction, u32 lanes, u32& needed) {
  needed = warp.alive;
  if (instruction.imm2 == kNoMask) return (lanes & warp.alive) == warp.alive;
  const u32* masks = member_masks(warp, instruction);
  bool complete = true;
  needed = 0;
  for_each_lane(lanes, [&](int lane) {
    u32 members = masks[lane] & warp.alive;
    needed |= members;
    if ((lanes & members) != members) complete = false;
  });
  return complete;
}

void execute(Slice& slice, const Instruction& instruction, u32 lanes) {
  if (slice.taint && !instruction.propagates_taint) taint_generic(slice.warp, instruction, lanes);
  instruction.handler(slice.warp, instruction, lanes);
}

// Lanes of one group may name different masks: the instruction runs once a mask.
void execute_per_mask(Slice& slice, const Instruction& instruction, u32 lanes) {
  u32 masks[32];
  memcpy(masks, member_masks(slice.warp, instruction), sizeof masks);
  while (lanes) {
    int first = __builtin_ctz(lanes);
    u32 mask = masks[first];
    if (!((mask >> first) & 1))
      slice.warp.fail(kErrorLaunch, first,
                      format("lane executes a .sync instruction whose member mask 0x%08x does not "
                             "contain it",
                             mask));
    u32 same = 0;
    for_each_lane(lanes, [&](int lane) {
      if (masks[lane] == mask) same |= 1u << lane;
    });
    execute(slice, instruction, same & mask);
    lanes &= ~same;
  }
}

// Lanes of one mask may wait at different bar.warp.sync: lets them go on when all have come.
void release_warp_sync(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  u32 mask = warp.source<u32>(instruction.operands[0])[__builtin_ctz(lanes)], arrived = 0;
  auto waits = [&](const Group& group) {
    return group.state == kGroupCollecting && slice.code[group.pc].control == kWarpSync;
  };
  for (int k = 0; k < warp.group_count; k++) {
    const Group& group = warp.groups[k];
    if (!waits(group)) continue;
    const u32* masks = warp.source<u32>(slice.code[group.pc].operands[0]);
    if (masks[__builtin_ctz(group.mask)] == mask) arrived |= group.mask;
  }
  if ((arrived & mask & warp.alive) != (mask & warp.alive)) return;
  for (int k = 0; k < warp.group_count; k++) {
    Group& group = warp.groups[k];
    if (!waits(group) || !(group.mask & mask)) continue;
    group.state = kGroupRunning;
    group.pc++;
  }
  if (warp.launch->check_race) warp.sync_epoch++;
}
}  // namespace

void step_collect(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  Group& group = slice.group();
  bool warp_sync = instruction.control == kWarpSync;
  u32 needed;
  if (!all_stand_here(warp, instruction, lanes, needed)) {
    u32 others = group.mask & ~lanes;
    if (others) split_group(warp, others, group.pc + 1);  // their guard is false: they go on
    slice.collect(needed);
    if (!others && warp_sync) release_warp_sync(slice, instruction, lanes);
    return;
  }
  if (!warp_sync) {
    if (instruction.imm2 == kNoMask)
      execute(slice, instruction, lanes);
    else
      execute_per_mask(slice, instruction, lanes);
  }
  if (warp.launch->check_race) warp.sync_epoch++;
  if (options().weak && warp_sync) weak_ordered(warp, lanes);
  group.pc++;
}

void step_wgmma_wait(Slice& slice, const Instruction& instruction, u32 lanes) {
  Warp& warp = slice.warp;
  u32 needed;
  if (!all_stand_here(warp, instruction, lanes, needed)) {
    slice.collect(needed);
    return;
  }
  if (!wgmma_wait_ready(warp, instruction)) {
    slice.yield_group();
    return;
  }
  instruction.handler(warp, instruction, lanes);
  if (warp.launch->check_race) warp.sync_epoch++;
  slice.group().pc++;
}
}  // namespace ptxsim
