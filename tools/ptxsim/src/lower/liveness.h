// When the virtual registers of a kernel hold values.
#pragma once
#include "state/instruction.h"

namespace ptxsim {
// From the first to the last place where a register is live. Instruction i reads at 2 i and writes
// up to 2 i + 1.
struct LiveInterval {
  u32 first = ~0u, last = 0;

  bool is_empty() const { return first == ~0u; }
  void include(u32 place);
};

// The interval of every register, over all ways through the code; the operands are ids.
std::vector<LiveInterval> live_intervals(const std::vector<Instruction>& code, size_t registers);
}  // namespace ptxsim
