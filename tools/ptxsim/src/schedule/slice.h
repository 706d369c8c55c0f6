// A time slice of a warp, and the instructions that the scheduler itself carries out.
#pragma once
#include "exec.h"

namespace ptxsim {
enum SliceEnd { kSliceBudget, kSliceBlocked, kSliceDone, kSliceSpin };
SliceEnd run_slice(Warp& warp, int budget);

struct Slice {
  Warp& warp;
  const Instruction* code;
  bool taint;                 // values loaded from uninitialized memory are followed
  bool reschedule = false;    // the groups have changed: choose again
  bool spun = false;          // a wait has failed
  bool keep_group = false;    // stay with the group chosen first, though another one has a lower pc
  bool out_of_lanes = false;  // nothing is left to run

  Group& group() { return warp.groups[warp.current_group]; }
  // Ends the turn of the current group: it waits for something and lets others run.
  void yield_group() {
    group().yielded = true;
    spun = reschedule = true;
    keep_group = false;
  }
  // The current group waits until the lanes stand here.
  void collect(u32 lanes) {
    group().state = kGroupCollecting;
    group().aux = lanes;
    reschedule = true;
  }
};

// Each carries out one instruction for the lanes whose guard is true; there is at least one.
void step_branch_indexed(Slice& slice, const Instruction& instruction, u32 lanes);
void step_exit(Slice& slice, const Instruction& instruction, u32 lanes);
void step_collect(Slice& slice, const Instruction& instruction, u32 lanes);
void step_wgmma_wait(Slice& slice, const Instruction& instruction, u32 lanes);
void step_barrier(Slice& slice, const Instruction& instruction, u32 lanes);
void step_cluster_arrive(Slice& slice, const Instruction& instruction, u32 lanes);
void step_grid_wait(Slice& slice, const Instruction& instruction, u32 lanes);
void step_cluster_wait(Slice& slice, const Instruction& instruction, u32 lanes);

// Releases barriers that wait only for lanes that have exited.
void release_barriers_after_exit(Cta& cta);
}  // namespace ptxsim
