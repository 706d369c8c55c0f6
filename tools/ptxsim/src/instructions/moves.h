// Handlers that the lowering emits by itself, to prepare operands and for calls.
#pragma once
#include <string>

#include "exec.h"

namespace ptxsim {
void execute_mov32(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_mov64(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_widen(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_narrow(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_sreg(Warp& warp, const Instruction& instruction, u32 lanes);
// The imm of execute_sreg, or -1 for an unknown name; slot: bytes of the value.
int special_register_code(const std::string& name, u8& slot);
void execute_pred_not(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_nop(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_vprintf(Warp& warp, const Instruction& instruction, u32 lanes);
void execute_assert_fail(Warp& warp, const Instruction& instruction, u32 lanes);
}  // namespace ptxsim
