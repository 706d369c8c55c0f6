// The state of an mbarrier, and addresses of operands of asynchronous instructions.
#pragma once
#include "exec.h"

namespace ptxsim {
// Bits 0-19: pending arrivals, 20-39: expected arrivals, 40-60: pending bytes (signed), 61: phase,
// 62-63: 2 when initialized.
struct Mbarrier {
  u64 bits;
  u32 pending() const { return bits & 0xfffff; }
  u32 expected() const { return (bits >> 20) & 0xfffff; }
  i32 pending_bytes() const { return (i32)((u32)(bits >> 40) << 11) >> 11; }
  u32 phase() const { return (bits >> 61) & 1; }
  bool valid() const { return (bits >> 62) == 2; }
  void set(u32 arrivals, u32 all_arrivals, i32 bytes, u32 phase_bit) {
    bits = (u64)(arrivals & 0xfffff) | ((u64)(all_arrivals & 0xfffff) << 20) |
           ((u64)((u32)bytes & 0x1fffff) << 40) | ((u64)phase_bit << 61) | (2ull << 62);
  }
};

// The mbarrier at shared address a; one that is not initialized is an error.
Mbarrier mbarrier_get(Warp& warp, int lane, u32 address, Cta** owner = nullptr);
// Adds to the bytes that the phase waits for.
void mbarrier_complete_bytes(Warp& warp, int lane, u32 address, i32 delta);

inline u64 address_of(Warp& warp, const Instruction& instruction, i32 operand, bool wide,
                      i64 offset, int lane) {
  return wide ? warp.source<u64>(operand)[lane] + (u64)offset
              : (u64)(u32)(warp.source<u32>(operand)[lane] + (u32)offset);
}
inline u32 shared_operand(Warp& warp, const Instruction& instruction, i32 operand, bool wide,
                          i64 offset, int lane) {
  u64 address = address_of(warp, instruction, operand, wide, offset, lane);
  return (Space)instruction.space == kShared ? (u32)address
                                             : shared_address(warp, lane, kGeneric, address);
}
}  // namespace ptxsim
