// Operations on floats that several files use, and the lowering of float arithmetic.
#pragma once
#include <cfenv>
#include <cmath>

#include "instructions/handlers.h"

namespace ptxsim {
inline float saturate(float x) { return x > 0 ? (x > 1 ? 1.f : x) : 0.f; }
template <class T>
T float_min_max(const Instruction& instruction, T a, T b, bool maximum) {
  if constexpr (sizeof(T) == 4)
    if (instruction.modifiers & kModifierFtz) {
      a = (T)flush_subnormal((float)a);
      b = (T)flush_subnormal((float)b);
    }
  bool signs_differ = false;
  if (instruction.modifiers & kModifierXorSign) signs_differ = std::signbit(a) != std::signbit(b);
  if (instruction.modifiers & (kModifierAbs | kModifierXorSign)) {
    a = std::fabs(a);
    b = std::fabs(b);
  }
  T result;
  if (a != a || b != b) {
    if ((instruction.modifiers & kModifierNan) || (a != a && b != b)) return canonical_nan((T)NAN);
    result = a != a ? b : a;
  } else if (a == b)
    result = (maximum ? std::signbit(a) : !std::signbit(a)) ? b : a;
  else
    result = (maximum ? a > b : a < b) ? a : b;
  if (instruction.modifiers & kModifierXorSign) result = signs_differ ? -result : result;
  return result;
}

// Sets the processor to a rounding mode of PTX; what includes this is compiled with
// -frounding-math.
inline int host_round(u8 r) {
  return r == kRoundZero   ? FE_TOWARDZERO
         : r == kRoundDown ? FE_DOWNWARD
         : r == kRoundUp   ? FE_UPWARD
                           : FE_TONEAREST;
}
struct RoundGuard {
  int previous = 0;
  bool active;
  explicit RoundGuard(u8 r) {
    active = r == kRoundZero || r == kRoundDown || r == kRoundUp;
    if (active) {
      previous = fegetround();
      fesetround(host_round(r));
    }
  }
  ~RoundGuard() {
    if (active) fesetround(previous);
  }
};

enum FloatOperation { kFloatAdd, kFloatSub, kFloatMul, kFloatFma, kFloatDiv, kFloatSqrt };
void lower_float(Lowering& lowering, const Statement& statement, Type type,
                 FloatOperation operation);
void lower_reciprocal(Lowering& lowering, const Statement& statement, Type type);
void lower_float_div_approx(Lowering& lowering, Type type);
void lower_float_min(Lowering& lowering, const Statement& statement, Type type);
void lower_float_abs(Lowering& lowering, const Statement& statement, Type type);
}  // namespace ptxsim
