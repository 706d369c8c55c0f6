// Integer multiplication: mul, mul24, mad, mad24, with wide results and carries.
#include "instructions/integer_types.h"

namespace ptxsim {
static Handler pick_mul_lo(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, wrapping_mul<T>>;
  });
}
static Handler pick_mul_hi(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, mul_high<T>>;
  });
}
static Handler pick_mad_lo(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return ternary<T, T, T, T,
                   [](T a, T b, T c) { return wrapping_add<T>(wrapping_mul<T>(a, b), c); }>;
  });
}
static Handler pick_mad_hi(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return ternary<T, T, T, T, [](T a, T b, T c) { return wrapping_add<T>(mul_high<T>(a, b), c); }>;
  });
}

static i32 saturating_add(i32 a, i32 b) {
  i64 s = (i64)a + b;
  return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : (i32)s;
}
static i32 mad_hi_sat(i32 a, i32 b, i32 c) { return saturating_add((i32)(((i64)a * b) >> 32), c); }
static i32 mul24s(i32 a, i32 b) {
  return (i32)((i64)((i32)((u32)a << 8) >> 8) * ((i32)((u32)b << 8) >> 8));
}
static i32 mad24s(i32 a, i32 b, i32 c) { return wrapping_add<i32>(mul24s(a, b), c); }
template <class D, class A>
static void execute_mul_wide(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane, (D)((D)read_lane<A>(a, lane) * (D)read_lane<A>(b, lane)));
  });
}
template <class D, class A>
static void execute_mad_wide(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  const void* c = warp.source(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane,
                  wrapping_add<D>((D)((D)read_lane<A>(a, lane) * (D)read_lane<A>(b, lane)),
                                  read_lane<D>(c, lane)));
  });
}

template <class T, bool HI>
static void execute_mad_cc(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  const void* c = warp.source(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    T x = HI ? mul_high<T>(read_lane<T>(a, lane), read_lane<T>(b, lane))
             : wrapping_mul<T>(read_lane<T>(a, lane), read_lane<T>(b, lane));
    T y = read_lane<T>(c, lane);
    Unsigned<T> ci = (instruction.imm & 1) ? (warp.carry >> lane) & 1 : 0;
    Unsigned<T> s = (Unsigned<T>)x + (Unsigned<T>)y;
    bool co = s < (Unsigned<T>)x;
    Unsigned<T> r = s + ci;
    co |= r < s;
    write_lane<T>(destination, lane, (T)r);
    if (instruction.imm & 2) warp.carry = (warp.carry & ~(1u << lane)) | ((u32)co << lane);
  });
}

void lower_integer_mul(Lowering& lowering, const Statement& statement, Type type) {
  if ((statement.name() == "mul24")) {
    if (statement.has("hi")) lowering.unsupported();
    if (type == kS32)
      emit_simple(lowering, binary<i32, i32, i32, mul24s>, kClassInteger, type, {type, type});
    else
      emit_simple(
          lowering,
          binary<u32, u32, u32, [](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }>,
          kClassInteger, type, {type, type});
    return;
  }
  if (statement.has("wide")) {
    switch (type) {
      case kU16:
        emit_simple(lowering, execute_mul_wide<u32, u16>, kClassInteger, kU32, {type, type});
        break;
      case kS16:
        emit_simple(lowering, execute_mul_wide<i32, i16>, kClassInteger, kS32, {type, type});
        break;
      case kU32:
        emit_simple(lowering, execute_mul_wide<u64, u32>, kClassInteger, kU64, {type, type});
        break;
      case kS32:
        emit_simple(lowering, execute_mul_wide<i64, i32>, kClassInteger, kS64, {type, type});
        break;
      default:
        lowering.unsupported();
    }
    return;
  }
  emit_simple(lowering, statement.has("hi") ? pick_mul_hi(type) : pick_mul_lo(type), kClassInteger,
              type, {type, type});
}

void lower_integer_mad(Lowering& lowering, const Statement& statement, Type type) {
  if ((statement.name() == "mad24")) {
    if (statement.has("hi")) lowering.unsupported();
    if (type == kS32)
      emit_simple(lowering, ternary<i32, i32, i32, i32, mad24s>, kClassInteger, type,
                  {type, type, type});
    else
      emit_simple(lowering,
                  ternary<u32, u32, u32, u32,
                          [](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; }>,
                  kClassInteger, type, {type, type, type});
    return;
  }
  bool cc = statement.has("cc"), c = (statement.name() == "madc");
  if (statement.has("wide")) {
    switch (type) {
      case kU16:
        emit_simple(lowering, execute_mad_wide<u32, u16>, kClassInteger, kU32, {type, type, kU32});
        break;
      case kS16:
        emit_simple(lowering, execute_mad_wide<i32, i16>, kClassInteger, kS32, {type, type, kS32});
        break;
      case kU32:
        emit_simple(lowering, execute_mad_wide<u64, u32>, kClassInteger, kU64, {type, type, kU64});
        break;
      case kS32:
        emit_simple(lowering, execute_mad_wide<i64, i32>, kClassInteger, kS64, {type, type, kS64});
        break;
      default:
        lowering.unsupported();
    }
    return;
  }
  bool hi = statement.has("hi");
  if (c || cc) {
    Handler handler = nullptr;
    if (type == kU32)
      handler = hi ? execute_mad_cc<u32, true> : execute_mad_cc<u32, false>;
    else if (type == kS32)
      handler = hi ? execute_mad_cc<i32, true> : execute_mad_cc<i32, false>;
    else if (type == kU64)
      handler = hi ? execute_mad_cc<u64, true> : execute_mad_cc<u64, false>;
    else if (type == kS64)
      handler = hi ? execute_mad_cc<i64, true> : execute_mad_cc<i64, false>;
    emit_simple(lowering, handler, kClassInteger, type, {type, type, type});
    lowering.kernel.code.back().imm = (c ? 1 : 0) | (cc ? 2 : 0);
    return;
  }
  if (statement.has("sat")) {
    emit_simple(lowering, ternary<i32, i32, i32, i32, mad_hi_sat>, kClassInteger, type,
                {type, type, type});
    return;
  }
  emit_simple(lowering, hi ? pick_mad_hi(type) : pick_mad_lo(type), kClassInteger, type,
              {type, type, type});
}

}  // namespace ptxsim
