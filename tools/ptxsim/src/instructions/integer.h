// Integer operations that several files use, and the lowering of integer arithmetic.
#pragma once
#include <type_traits>

#include "instructions/handlers.h"

namespace ptxsim {
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
inline T wrapping_add(T a, T b) {
  return (T)((Unsigned<T>)a + (Unsigned<T>)b);
}
template <class T>
inline T wrapping_sub(T a, T b) {
  return (T)((Unsigned<T>)a - (Unsigned<T>)b);
}
template <class T>
inline T wrapping_mul(T a, T b) {
  if constexpr (sizeof(T) == 2)
    return (T)(u16)((u32)(u16)a * (u32)(u16)b);
  else
    return (T)((Unsigned<T>)a * (Unsigned<T>)b);
}
template <class T>
inline T mul_high(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    if constexpr (std::is_signed_v<T>)
      return (T)(((__int128)a * b) >> 64);
    else
      return (T)(((unsigned __int128)a * b) >> 64);
  } else if constexpr (std::is_signed_v<T>)
    return (T)(((i64)a * b) >> (8 * sizeof(T)));
  else
    return (T)(((u64)a * b) >> (8 * sizeof(T)));
}
template <class T>
inline T divide(T a, T b) {
  if (b == 0) return (T) ~(T)0;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return wrapping_sub<T>(0, a);
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}
template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
inline T sum_abs_difference(T a, T b, T c) {
  return wrapping_add<T>(a > b ? wrapping_sub<T>(a, b) : wrapping_sub<T>(b, a), c);
}
template <class T>
inline T absolute(T a) {
  return a < 0 ? wrapping_sub<T>(0, a) : a;
}
inline i32 saturating_add(i32 a, i32 b) {
  i64 sum = (i64)a + b;
  return (i32)(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
}

// Emits an operation of the table in integer.cpp, all of whose operands are of one type.
void emit_integer(Lowering& lowering, const std::string& name, Type type);

void lower_integer_add(Lowering& lowering, const Statement& statement, Type type);
void lower_integer_mul(Lowering& lowering, const Statement& statement, Type type);
void lower_integer_mad(Lowering& lowering, const Statement& statement, Type type);
void lower_integer_div(Lowering& lowering, const Statement& statement, Type type);
void lower_integer_min(Lowering& lowering, const Statement& statement, Type type);
void lower_integer_abs(Lowering& lowering, const Statement& statement, Type type);

}  // namespace ptxsim
