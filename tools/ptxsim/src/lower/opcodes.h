// Which function lowers an opcode. The files in instructions/ register the opcodes that they
// implement.
#pragma once
#include <initializer_list>
#include <utility>

#include "lower/lowering.h"

namespace ptxsim {
typedef void (*LowerFunction)(Lowering&, const Statement&);

// A static object in a file of instructions: {{"add", lower_add}, {"sub", lower_add}}.
struct Opcodes {
  Opcodes(std::initializer_list<std::pair<const char*, LowerFunction>> entries);
};

// The function of the longest registered opcode that the statement's begins with, or null:
// `cp.async.bulk` before `cp.async`.
LowerFunction find_lowering(const Statement& statement);
}  // namespace ptxsim
