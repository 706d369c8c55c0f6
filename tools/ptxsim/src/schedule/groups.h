// The diverged groups of a warp: which one runs, which ones meet.
#pragma once
#include "exec.h"

namespace ptxsim {
inline void remove_group(Warp& warp, int index) {
  warp.group_count--;
  if (index != warp.group_count) warp.groups[index] = warp.groups[warp.group_count];
  if (warp.current_group == warp.group_count) warp.current_group = index;
}

inline bool can_run(const Group& group) { return group.state == kGroupRunning && !group.yielded; }

// The group to run: the one at the lowest pc, so that groups meet again. -1: none can run.
inline int lowest_group(const Warp& warp) {
  int best = -1;
  for (int k = 0; k < warp.group_count; k++)
    if (can_run(warp.groups[k]) && (best < 0 || warp.groups[k].pc < warp.groups[best].pc)) best = k;
  return best;
}
inline int highest_group(const Warp& warp) {
  int best = -1;
  for (int k = 0; k < warp.group_count; k++)
    if (can_run(warp.groups[k]) && (best < 0 || warp.groups[k].pc > warp.groups[best].pc)) best = k;
  return best;
}

// Merges the groups that stand at the pc of the current group. Lanes that have arrived at a barrier
// stay apart.
inline void merge_current(Warp& warp) {
  GroupState state = warp.groups[warp.current_group].state;
  if (state == kGroupAtBarrier || state == kGroupAtClusterBarrier || state == kGroupAtGridWait)
    return;
  for (int k = 0; k < warp.group_count;) {
    Group& group = warp.groups[warp.current_group];
    Group& other = warp.groups[k];
    if (k != warp.current_group && other.pc == group.pc &&
        (other.state == kGroupRunning || other.state == kGroupCollecting)) {
      group.mask |= other.mask;
      group.yielded = group.yielded && other.yielded;
      group.state = kGroupRunning;
      remove_group(warp, k);
      k = 0;
    } else
      k++;
  }
}

// Moves lanes of the current group into a new group at pc.
inline void split_group(Warp& warp, u32 lanes, u32 pc) {
  warp.groups[warp.current_group].mask &= ~lanes;
  Group& added = warp.groups[warp.group_count++];
  added = Group();
  added.mask = lanes;
  added.pc = pc;
}
}  // namespace ptxsim
