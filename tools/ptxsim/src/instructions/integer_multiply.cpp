// Integer multiplication: mul, mul24, mad, mad24, with wide results and carries.
#include "instructions/integer_types.h"

namespace ptxsim {
// The handler that f makes for the integer type of an instruction and the type of twice its width.
template <class F>
static Handler by_wide_type(Type type, F f) {
  switch (type) {
    case kU16:
      return f(u32(), u16());
    case kS16:
      return f(i32(), i16());
    case kU32:
      return f(u64(), u32());
    case kS32:
      return f(i64(), i32());
    default:
      return nullptr;
  }
}
static Type wide_type(Type type) {
  return type == kU16 ? kU32 : type == kS16 ? kS32 : type == kU32 ? kU64 : kS64;
}
template <class D, class A>
static D mul_wide(A a, A b) {
  return (D)a * (D)b;
}
template <class D, class A>
static D mad_wide(A a, A b, D c) {
  return wrapping_add<D>(mul_wide<D, A>(a, b), c);
}
static Handler mul_wide_handler(Type type) {
  return by_wide_type(type, [](auto wide, auto narrow) -> Handler {
    using D = decltype(wide);
    using A = decltype(narrow);
    return binary<D, A, A, mul_wide<D, A>>;
  });
}
static Handler mad_wide_handler(Type type) {
  return by_wide_type(type, [](auto wide, auto narrow) -> Handler {
    using D = decltype(wide);
    using A = decltype(narrow);
    return ternary<D, A, A, D, mad_wide<D, A>>;
  });
}

static i32 mad_hi_sat(i32 a, i32 b, i32 c) { return saturating_add((i32)(((i64)a * b) >> 32), c); }

// mul24 and mad24 multiply the lower 24 bits.
static i32 mul24_signed(i32 a, i32 b) {
  return (i32)((i64)((i32)((u32)a << 8) >> 8) * ((i32)((u32)b << 8) >> 8));
}
static u32 mul24_unsigned(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }
static i32 mad24_signed(i32 a, i32 b, i32 c) { return wrapping_add<i32>(mul24_signed(a, b), c); }
static u32 mad24_unsigned(u32 a, u32 b, u32 c) { return mul24_unsigned(a, b) + c; }

template <class T, bool kHigh>
static void execute_mad_carry(Warp& warp, const Instruction& instruction, u32 lanes) {
  typedef Unsigned<T> U;
  U* destination = warp.destination<U>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  const U* c = warp.source<U>(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    T product = kHigh ? mul_high<T>(a[lane], b[lane]) : wrapping_mul<T>(a[lane], b[lane]);
    destination[lane] = add_with_carry<U>(warp, instruction, lane, (U)product, c[lane]);
  });
}
static Handler mad_carry_handler(Type type, bool high) {
  switch (type) {
    case kU32:
      return high ? execute_mad_carry<u32, true> : execute_mad_carry<u32, false>;
    case kS32:
      return high ? execute_mad_carry<i32, true> : execute_mad_carry<i32, false>;
    case kU64:
      return high ? execute_mad_carry<u64, true> : execute_mad_carry<u64, false>;
    case kS64:
      return high ? execute_mad_carry<i64, true> : execute_mad_carry<i64, false>;
    default:
      return nullptr;
  }
}

void lower_integer_mul(Lowering& lowering, const Statement& statement, Type type) {
  if (statement.name() == "mul24") {
    if (statement.has("hi")) lowering.unsupported();
    Handler handler =
        type == kS32 ? binary<i32, i32, i32, mul24_signed> : binary<u32, u32, u32, mul24_unsigned>;
    emit_simple(lowering, handler, kClassInteger, type, {type, type});
  } else if (statement.has("wide")) {
    emit_simple(lowering, mul_wide_handler(type), kClassInteger, wide_type(type), {type, type});
  } else {
    emit_integer(lowering, statement.has("hi") ? "mul.hi" : "mul.lo", type);
  }
}

void lower_integer_mad(Lowering& lowering, const Statement& statement, Type type) {
  bool high = statement.has("hi");
  auto emit = [&](Handler handler) {
    emit_simple(lowering, handler, kClassInteger, type, {type, type, type});
  };
  if (statement.name() == "mad24") {
    if (high) lowering.unsupported();
    emit(type == kS32 ? ternary<i32, i32, i32, i32, mad24_signed>
                      : ternary<u32, u32, u32, u32, mad24_unsigned>);
  } else if (statement.has("wide")) {
    Type wide = wide_type(type);
    emit_simple(lowering, mad_wide_handler(type), kClassInteger, wide, {type, type, wide});
  } else if (u32 carry = carry_of(statement)) {
    emit(mad_carry_handler(type, high));
    lowering.kernel.code.back().imm = carry;
  } else if (statement.has("sat")) {
    emit(ternary<i32, i32, i32, i32, mad_hi_sat>);
  } else {
    emit_integer(lowering, high ? "mad.hi" : "mad.lo", type);
  }
}
}  // namespace ptxsim
