// Picks the instance of a template for the integer type of an instruction; carries.
#pragma once
#include "instructions/integer.h"

namespace ptxsim {
// The handler that f makes for the integer type of an instruction.
template <class F>
inline Handler by_integer_type(Type type, F f) {
  switch (type) {
    case kU16:
    case kB16:
      return f(u16());
    case kS16:
      return f(i16());
    case kU32:
    case kB32:
      return f(u32());
    case kS32:
      return f(i32());
    case kU64:
    case kB64:
      return f(u64());
    case kS64:
      return f(i64());
    default:
      return nullptr;
  }
}

// What an instruction does with the condition code: bits of its imm.
constexpr u32 kUsesCarry = 1, kSetsCarry = 2;
inline u32 carry_of(const Statement& statement) {
  const std::string& name = statement.name();
  bool uses = name.size() == 4 && name.back() == 'c';  // addc, subc, madc
  return (uses ? kUsesCarry : 0) | (statement.has("cc") ? kSetsCarry : 0);
}
inline u32 carry_in(const Warp& warp, const Instruction& instruction, int lane) {
  return (instruction.imm & kUsesCarry) ? (warp.carry >> lane) & 1 : 0;
}
inline void carry_out(Warp& warp, const Instruction& instruction, int lane, bool carry) {
  if (instruction.imm & kSetsCarry)
    warp.carry = (warp.carry & ~(1u << lane)) | ((u32)carry << lane);
}
// a + b + carry; U is unsigned.
template <class U>
inline U add_with_carry(Warp& warp, const Instruction& instruction, int lane, U a, U b) {
  U sum = a + b, result = sum + (U)carry_in(warp, instruction, lane);
  carry_out(warp, instruction, lane, sum < a || result < sum);
  return result;
}
}  // namespace ptxsim
