// What asynchronous copies of whole ranges share: TMA tensor copies, linear bulk copies, st.async.
#pragma once
#include <functional>

#include "exec.h"
#include "lower/lowering.h"

namespace ptxsim {
// The operands of one cp.async.bulk, cp.reduce.async.bulk or st.async.
struct BulkInfo {
  int rank = 0;  // >0: tensor
  bool multicast = false;
  i64 destination_offset = 0, source_offset = 0, barrier_offset = 0;
  bool wide_destination = false, wide_source = false, wide_barrier = false;
  u8 op = 0, type = 0;
};

// Reports a global range outside every allocation; a store initializes it.
void check_global(Warp& warp, int lane, u64 address, u64 bytes, bool store);
// Reports a shared range that is misaligned or outside the CTA's shared memory.
void shared_range(Warp& warp, int lane, Cta& cta, u32 offset, u32 bytes, u32 align,
                  const char* what);

// Runs fn some scheduler rounds later.
void enqueue(Warp& warp, const Instruction& instruction, int lane, std::function<void()> action);

// The CTAs whose shared memory a copy writes, and their mbarriers.
struct Landing {
  u32 mask;          // ranks
  int barrier_rank;  // -1: each CTA's own, at the same offset
  u32 offset, barrier_offset;

  bool has(u32 rank) const { return (mask >> rank) & 1; }
  u32 rank_of_barrier(u32 rank) const { return barrier_rank < 0 ? rank : (u32)barrier_rank; }
  u32 barrier_address(u32 rank) const { return (rank_of_barrier(rank) + 1) << 24 | barrier_offset; }
};
// mask_operand: the multicast mask, read where the copy is one.
Landing landing_of(Warp& warp, const BulkInfo& info, int lane, u32 destination, u32 barrier,
                   i32 mask_operand);
// Checks where `bytes` will land, and the mbarriers; notes the writes for the race check.
void check_landing(Warp& warp, const Landing& landing, int lane, u32 bytes, u32 align,
                   const char* what, const std::vector<u32>& clock);
// Tells the mbarrier of a CTA that its bytes are there.
void complete_landing(Warp& warp, const Landing& landing, int lane, u32 rank, u32 bytes,
                      const std::vector<u32>& clock);

// Reduces n bytes of elements of a tensor map's data type into dst.
// op: 0 add 1 min 2 max 3 inc 4 dec 5 and 6 or 7 xor
void reduce_bytes(u8* destination, const u8* source, u32 bytes, int data_type, int op);
// op of reduce_bytes, or -1.
int reduction_from_name(const Statement& statement);
// A tensor map's data type, or -1.
int data_type_of(Type type);

void run_tensor_store(Warp& warp, BulkCopy& copy);
void lower_tensor_copy(Lowering& lowering, const Statement& statement, BulkInfo* info, bool load,
                       bool reduces);
}  // namespace ptxsim
