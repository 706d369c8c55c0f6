// Conversions to and from packed types.
#pragma once
#include "instructions/handlers.h"

namespace ptxsim {
// cvt.pack: two integers, saturated, into a packed word.
void lower_convert_pack(Lowering& lowering, const Statement& statement);
// cvt to or from a pair of small floats; false if the types are no such pair.
bool lower_convert_pair(Lowering& lowering, const Statement& statement, Type to, Type from);
}  // namespace ptxsim
