// Picks the instance of a template for the integer type of an instruction.
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
}  // namespace ptxsim
