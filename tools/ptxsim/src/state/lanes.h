// Lanes of a mask, and the value of a lane in a register.
#pragma once
#include "state/warp.h"

namespace ptxsim {
// Calls f(lane) for each lane of the mask. A whole warp gets a loop of its own, which the compiler
// vectorizes.
template <class F>
[[gnu::always_inline]] inline void for_each_lane(u32 mask, F&& f) {
  if (mask == kFullMask) {
    for (int lane = 0; lane < 32; lane++) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

// A slot holds 4 bytes a lane for types up to 32 bits, 8 for 64-bit ones.
template <class T>
inline T read_lane(const void* slot, int lane) {
  if constexpr (sizeof(T) == 8 || sizeof(T) == 4)
    return ((const T*)slot)[lane];
  else {
    u32 word = ((const u32*)slot)[lane];
    T value;
    memcpy(&value, &word, sizeof(T));
    return value;
  }
}
template <class T>
inline void write_lane(void* slot, int lane, T value) {
  if constexpr (sizeof(T) == 8 || sizeof(T) == 4)
    ((T*)slot)[lane] = value;
  else {
    u32 word = 0;
    memcpy(&word, &value, sizeof(T));
    ((u32*)slot)[lane] = word;
  }
}
inline void write_predicate(Warp& warp, i32 operand, u32 value, u32 lanes) {
  u32* mask = warp.destination<u32>(operand);
  *mask = (*mask & ~lanes) | (value & lanes);
}
inline u32 read_predicate(const Warp& warp, i32 operand) { return *warp.source<u32>(operand); }
}  // namespace ptxsim
