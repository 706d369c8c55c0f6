// Addresses of a warp's memory instruction, and the lowering of its address operand.
#pragma once
#include "exec.h"
#include "lower/lowering.h"

namespace ptxsim {
// addresses of the active lanes; mod bit 0: 8-byte base
inline void lane_addresses(Warp& warp, const Instruction& instruction, i32 o, u64* out) {
  if (instruction.modifiers & 1) {
    const u64* b = warp.source<u64>(o);
    u64 f = (u64)instruction.offset;
    for (int i = 0; i < 32; i++) out[i] = b[i] + f;
  } else {
    const u32* b = warp.source<u32>(o);
    u32 f = (u32)instruction.offset;
    for (int i = 0; i < 32; i++) out[i] = (u32)(b[i] + f);
  }
}

inline bool is_global(Space space, u64 a) {
  return space == kGlobal || (space == kGeneric && !in_shared(a) && !in_local(a));
}

void misaligned(Warp& warp, int lane, Space space, u64 addr, u32 n);
u8* local_pointer(Warp& warp, int lane, u64 addr, u32 n);

// Counts the sectors or wavefronts of one request of a warp.
void count_global(Warp& warp, const u64* a, u32 lanes, u32 n, bool st);
void count_shared(Warp& warp, const u64* a, u32 lanes, u32 n);
void count_memory(Warp& warp, const Instruction& instruction, Space space, const u64* a, u32 lanes,
                  u32 n, bool st);

// Elements of .v2 and .v4.
inline int vector_length(const Statement& statement) {
  return statement.has("v2") ? 2 : statement.has("v4") ? 4 : statement.has("v8") ? 8 : 1;
}
inline void set_address_operand(Lowering& lowering, Instruction& instruction, i32 base, i64 off) {
  instruction.offset = off;
  if (lowering.slot_of(base) == 8) instruction.modifiers |= 1;
}

}  // namespace ptxsim
