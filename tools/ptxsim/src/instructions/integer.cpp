// Integer addition, comparison of magnitudes, division and dot products.
#include "instructions/integer_types.h"

namespace ptxsim {
static Handler pick_add(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, wrapping_add<T>>;
  });
}
static Handler pick_sub(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, wrapping_sub<T>>;
  });
}
static Handler pick_div(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, divide<T>>;
  });
}
static Handler pick_rem(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, remainder<T>>;
  });
}
static Handler pick_min(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, smaller<T>>;
  });
}
static Handler pick_max(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, larger<T>>;
  });
}
static Handler pick_sad(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return ternary<T, T, T, T, sum_abs_difference<T>>;
  });
}
static Handler pick_neg(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return unary<T, T, [](T a) { return wrapping_sub<T>(0, a); }>;
  });
}
static Handler pick_abs(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return unary<T, T, absolute<T>>;
  });
}

static i32 saturating_add(i32 a, i32 b) {
  i64 s = (i64)a + b;
  return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : (i32)s;
}
static i32 saturating_sub(i32 a, i32 b) {
  i64 s = (i64)a - b;
  return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : (i32)s;
}
// packed 16-bit integers
template <class T, auto F>
static void integer_pair(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32 *a = warp.source<u32>(instruction.operands[1]),
            *b = warp.source<u32>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    u32 x = a[lane];
    u32 y = b[lane];
    T lo = F((T)x, (T)y);
    T hi = F((T)(x >> 16), (T)(y >> 16));
    if (instruction.modifiers & kModifierRelu) {
      if ((i16)lo < 0) lo = 0;
      if ((i16)hi < 0) hi = 0;
    }
    destination[lane] = (u32)(u16)lo | ((u32)(u16)hi << 16);
  });
}

// carry chains
template <class T>
static void execute_add_cc(Warp& warp, const Instruction& instruction,
                           u32 lanes) {  // imm bit0: use carry, bit1: set carry
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    T x = read_lane<T>(a, lane);
    T y = read_lane<T>(b, lane);
    T ci = (instruction.imm & 1) ? (warp.carry >> lane) & 1 : 0;
    T s = x + y;
    bool co = s < x;
    T r = s + ci;
    co |= r < s;
    write_lane<T>(destination, lane, r);
    if (instruction.imm & 2) warp.carry = (warp.carry & ~(1u << lane)) | ((u32)co << lane);
  });
}
template <class T>
static void execute_sub_cc(Warp& warp, const Instruction& instruction,
                           u32 lanes) {  // CC holds the borrow
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    T x = read_lane<T>(a, lane);
    T y = read_lane<T>(b, lane);
    T bi_ = (instruction.imm & 1) ? (warp.carry >> lane) & 1 : 0;
    T s = x - y;
    bool bo = x < y;
    T r = s - bi_;
    bo |= s < bi_;
    write_lane<T>(destination, lane, r);
    if (instruction.imm & 2) warp.carry = (warp.carry & ~(1u << lane)) | ((u32)bo << lane);
  });
}
template <class A, class B>
static i32 dp4(u32 a, u32 b, i32 c) {
  u32 s = (u32)c;
  for (int k = 0; k < 4; k++) s += (u32)((i32)(A)(a >> (8 * k)) * (i32)(B)(b >> (8 * k)));
  return (i32)s;
}
template <class A, class B>
static i32 dp2(const Instruction& instruction, u32 a, u32 b, u32 c) {
  u32 s = c;
  if (instruction.imm) b >>= 16;
  for (int k = 0; k < 2; k++) {
    i32 x = std::is_signed_v<A> ? (i32)(i16)(a >> (16 * k)) : (i32)(u16)(a >> (16 * k));
    s += (u32)(x * (i32)(B)(b >> (8 * k)));
  }
  return (i32)s;
}

void lower_integer_add(Lowering& lowering, const Statement& statement, Type type) {
  bool sub = statement.name()[0] == 's', c = statement.name().size() == 4, cc = statement.has("cc");
  if (type == kU16x2) {
    emit_simple(lowering,
                sub ? integer_pair<u16, wrapping_sub<u16>> : integer_pair<u16, wrapping_add<u16>>,
                kClassInteger, kB32, {kB32, kB32});
    return;
  }
  if (type == kS16x2) {
    emit_simple(lowering,
                sub ? integer_pair<i16, wrapping_sub<i16>> : integer_pair<i16, wrapping_add<i16>>,
                kClassInteger, kB32, {kB32, kB32});
    return;
  }
  if (c || cc) {
    bool w64 = type_bytes(type) == 8;
    emit_simple(lowering,
                sub ? (w64 ? execute_sub_cc<u64> : execute_sub_cc<u32>)
                    : (w64 ? execute_add_cc<u64> : execute_add_cc<u32>),
                kClassInteger, type, {type, type});
    lowering.kernel.code.back().imm = (c ? 1 : 0) | (cc ? 2 : 0);
    return;
  }
  if (statement.has("sat")) {
    emit_simple(lowering,
                sub ? binary<i32, i32, i32, saturating_sub> : binary<i32, i32, i32, saturating_add>,
                kClassInteger, type, {type, type});
    return;
  }
  emit_simple(lowering, sub ? pick_sub(type) : pick_add(type), kClassInteger, type, {type, type});
}

void lower_integer_min(Lowering& lowering, const Statement& statement, Type type) {
  bool mx = statement.name() == "max";
  if (type == kU16x2)
    emit_simple(lowering, mx ? integer_pair<u16, larger<u16>> : integer_pair<u16, smaller<u16>>,
                kClassInteger, kB32, {kB32, kB32});
  else if (type == kS16x2)
    emit_simple(lowering, mx ? integer_pair<i16, larger<i16>> : integer_pair<i16, smaller<i16>>,
                kClassInteger, kB32, {kB32, kB32});
  else if (statement.has("relu") && type == kS32)
    emit_simple(lowering,
                mx ? binary<i32, i32, i32, relu_max<i32>> : binary<i32, i32, i32, relu_min<i32>>,
                kClassInteger, type, {type, type});
  else
    emit_simple(lowering, mx ? pick_max(type) : pick_min(type), kClassInteger, type, {type, type});
  lowering.kernel.code.back().modifiers |= float_modifiers(lowering);
}

void lower_integer_div(Lowering& lowering, const Statement& statement, Type type) {
  emit_simple(lowering, (statement.name() == "div") ? pick_div(type) : pick_rem(type),
              kClassInteger, type, {type, type});
}

void lower_integer_abs(Lowering& lowering, const Statement& statement, Type type) {
  emit_simple(lowering, statement.name() == "abs" ? pick_abs(type) : pick_neg(type), kClassInteger,
              type, {type});
}

static void lower_sad(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering, pick_sad(type), kClassInteger, type, {type, type, type});
}

static void lower_dp4a(Lowering& lowering, const Statement& statement) {
  auto ts = lowering.types();
  bool sa = ts[0] == kS32, sb = ts[1] == kS32;
  Handler handler = sa ? (sb ? ternary<i32, u32, u32, i32, dp4<i8, i8>>
                             : ternary<i32, u32, u32, i32, dp4<i8, u8>>)
                       : (sb ? ternary<i32, u32, u32, i32, dp4<u8, i8>>
                             : ternary<i32, u32, u32, i32, dp4<u8, u8>>);
  emit_simple(lowering, handler, kClassInteger, kS32, {kB32, kB32, kS32});
}

static void lower_dp2a(Lowering& lowering, const Statement& statement) {
  auto ts = lowering.types();
  bool sa = ts[0] == kS32, sb = ts[1] == kS32;
  Handler handler =
      sa ? (sb ? ternary_modified<i32, u32, dp2<i8, i8>> : ternary_modified<i32, u32, dp2<i8, u8>>)
         : (sb ? ternary_modified<i32, u32, dp2<u8, i8>> : ternary_modified<i32, u32, dp2<u8, u8>>);
  emit_simple(lowering, handler, kClassInteger, kS32, {kB32, kB32, kS32});
  lowering.kernel.code.back().imm = statement.has("hi");
}

static const Opcodes kOpcodes{{"sad", lower_sad}, {"dp4a", lower_dp4a}, {"dp2a", lower_dp2a}};
}  // namespace ptxsim
