// Addresses of a warp's memory instruction, and the lowering of its address operand.
#pragma once
#include "exec.h"
#include "lower/lowering.h"

namespace ptxsim {
// addresses of the active lanes; mod bit 0: 8-byte base
inline void lane_addresses(Warp& warp, const Instruction& instruction, i32 operand, u64* out) {
  if (instruction.modifiers & 1) {
    const u64* base = warp.source<u64>(operand);
    u64 offset = (u64)instruction.offset;
    for (int lane = 0; lane < 32; lane++) out[lane] = base[lane] + offset;
  } else {
    const u32* base = warp.source<u32>(operand);
    u32 offset = (u32)instruction.offset;
    for (int lane = 0; lane < 32; lane++) out[lane] = (u32)(base[lane] + offset);
  }
}

inline bool is_global(Space space, u64 address) {
  return space == kGlobal || (space == kGeneric && !in_shared(address) && !in_local(address));
}

void misaligned(Warp& warp, int lane, Space space, u64 address, u32 bytes);
u8* local_pointer(Warp& warp, int lane, u64 address, u32 bytes);

// Counts the sectors or wavefronts of one request of a warp.
void count_global(Warp& warp, const u64* addresses, u32 lanes, u32 bytes, bool store);
void count_shared(Warp& warp, const u64* addresses, u32 lanes, u32 bytes);
void count_memory(Warp& warp, const Instruction& instruction, Space space, const u64* addresses,
                  u32 lanes, u32 bytes, bool store);

// Elements of .v2 and .v4.
inline int vector_length(const Statement& statement) {
  return statement.has("v2") ? 2 : statement.has("v4") ? 4 : statement.has("v8") ? 8 : 1;
}
inline void set_address_operand(Lowering& lowering, Instruction& instruction, i32 base,
                                i64 offset) {
  instruction.offset = offset;
  if (lowering.slot_of(base) == 8) instruction.modifiers |= 1;
}

}  // namespace ptxsim
