// A warp: its registers, its diverged groups and the copies that it has in flight.
#pragma once
#include "state/launch.h"

namespace ptxsim {
struct Cta;

constexpr u32 kFullMask = 0xffffffffu;

enum GroupState : u8 {
  kGroupRunning,
  kGroupAtBarrier,
  kGroupAtClusterBarrier,
  kGroupCollecting,
  kGroupAtGridWait  // griddepcontrol.wait
};
// Lanes that stand at the same pc.
struct Group {
  u32 pc = 0, mask = 0;
  GroupState state = kGroupRunning;
  bool yielded = false;
  u32 aux = 0;  // the id of the barrier, or the lanes waited for
};

// A cp.async that has been issued.
struct AsyncCopy {
  u8 lane, size, source_bytes;
  bool ignore;
  u32 group;
  u32 destination;
  u64 source;
  u32 pc;
};
// A bulk copy from shared to global memory that has been issued.
struct BulkCopy {
  enum K : u8 { kTensorStore, kTensorReduce, kLinearStore, kLinearReduce } kind;
  u8 lane;
  u8 reduction;
  u8 type;
  u32 group;
  u64 map = 0;
  i32 coordinates[5];
  u32 shared_address = 0;
  u64 global_address = 0;
  u32 bytes = 0;
  u32 pc = 0;
  bool read = false;
};

struct Warp {
  u8* registers = nullptr;
  const u8* constants = nullptr;
  Cta* cta = nullptr;
  Launch* launch = nullptr;
  Worker* worker = nullptr;
  int id = 0;
  u32 alive = 0;  // lanes that have not exited
  Group groups[32];
  int group_count = 0, current_group = 0;
  u32 carry = 0;  // the condition code, one bit a lane
  u32 tid[3][32];
  u8* local = nullptr;
  const Instruction* current = nullptr;
  bool failed_wait = false;  // the last try_wait was false
  u32 grid_waited = 0;       // lanes that have passed griddepcontrol.wait
  u32 rotate = 0;            // slices so far in which the warp was diverged
  u32 cluster_phase[32];     // phase of the cluster barrier at which each lane arrived
  u32 cluster_arrived = 0;   // lanes that have arrived and not waited
  std::vector<AsyncCopy> async_copies;
  u32 async_copy_group[32];
  std::vector<BulkCopy> bulk_copies;
  u32 bulk_group[32];

  // race check
  std::vector<u32> clock;  // vector clock
  u32 sync_epoch = 0;      // synchronizations of the warp so far
  struct WgmmaRead {
    u32 a_address, b_address;
    u64 a_hash, b_hash;
    u32 group;
    const Instruction* instruction;
    u64 a_descriptor, b_descriptor;
  };
  std::vector<WgmmaRead> wgmma_reads;  // operands of wgmma in flight
  u32 wgmma_group = 0;
  std::vector<u32> wgmma_clock;  // released by wgmma.commit_group

  // init check: lanes whose value depends on uninitialized memory, and the load it came from
  struct Taint {
    u32 lanes, origin;
  };
  std::vector<Taint> taint;    // one a 64 bytes of the registers; empty: the check is off
  std::vector<u8> local_init;  // shadow of local memory

  template <class T = void>
  inline T* destination(i32 operand) {
    return (T*)(registers + operand);
  }
  template <class T = void>
  inline const T* source(i32 operand) const {
    return (const T*)(operand >= 0 ? registers + operand : constants + ~operand);
  }
  [[noreturn]] void fail(ErrorKind kind, int lane, const std::string& message) {
    throw SimError(kind, message, lane);
  }
};

// True when every warp of the warpgroup has issued the groups that wgmma.wait_group waits for.
bool wgmma_wait_ready(Warp& warp, const Instruction& instruction);
}  // namespace ptxsim
