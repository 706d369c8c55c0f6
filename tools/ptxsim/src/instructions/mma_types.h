// What mma and wgmma share: their shape and types, and the elements of their registers.
#pragma once
#include "instructions/handlers.h"

namespace ptxsim {
struct MmaInfo {
  int m, n, k;
  Type d_type, a_type, b_type, c_type;
  bool saturate = false, and_popc = false, is_f64 = false;
  int a_count, b_count, c_count;  // registers
  int scale_a = 1, scale_b = 1, trans_a = 0, trans_b = 0;
  bool a_in_registers = false;  // wgmma: A from registers
};

inline int bits_of(Type type) {
  switch (type) {
    case kS4:
    case kU4:
      return 4;
    case kB1:
      return 1;
    case kS8:
    case kU8:
    case kE4m3:
    case kE5m2:
      return 8;
    case kF16:
    case kBf16:
      return 16;
    case kTf32:
    case kF32:
    case kS32:
      return 32;
    case kF64:
      return 64;
    default:
      return 0;
  }
}
inline bool is_integer(Type type) {
  return type == kS8 || type == kU8 || type == kS4 || type == kU4 || type == kB1;
}

// Element j of a 32-bit register.
inline i32 decode_integer(u32 word, int j, Type type) {
  switch (type) {
    case kS8:
      return (i8)(word >> (8 * j));
    case kU8:
      return (u8)(word >> (8 * j));
    case kS4:
      return (i32)(word << (28 - 4 * j)) >> 28;
    case kU4:
      return (word >> (4 * j)) & 15;
    default:
      return (word >> j) & 1;
  }
}
inline float decode_float(u32 word, int j, Type type) {
  switch (type) {
    case kF16:
      return half_bits_to_float((u16)(word >> (16 * j)));
    case kBf16:
      return bf16_to_float((u16)(word >> (16 * j)));
    case kTf32:
      return bits_to<float>(word & 0xffffe000u);
    case kE4m3:
      return (float)from_small((word >> (8 * j)) & 0xff, kSmallE4m3);
    default:
      return (float)from_small((word >> (8 * j)) & 0xff, kSmallE5m2);
  }
}

// M, N and K of an opcode's word like m16n8k32.
inline bool parse_shape(const Statement& statement, int& M, int& N, int& K) {
  for (auto& word : statement.opcode)
    if (sscanf(word.c_str(), "m%dn%dk%d", &M, &N, &K) == 3) return true;
  return false;
}

// The instruction waits for all lanes of its warp, those of a diverged warp too.
inline void collect_warp(Instruction& instruction) {
  instruction.control = kCollect;
  instruction.imm2 = 0xff;
}

inline i32 saturated(i64 sum) {
  return (i32)(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
}
}  // namespace ptxsim
