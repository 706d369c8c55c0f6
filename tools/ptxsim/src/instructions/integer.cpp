// Integer addition, comparison of magnitudes, division and dot products.
#include "instructions/integer_types.h"

namespace ptxsim {
namespace {
// Handlers of an operation F on operands of one type, by the type.
template <auto F>
Handler unary_of(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return unary<T, T, F>;
  });
}
template <auto F>
Handler binary_of(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, T, F>;
  });
}
template <auto F>
Handler ternary_of(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return ternary<T, T, T, T, F>;
  });
}

constexpr struct {
  const char* name;
  size_t sources;
  Handler (*handler)(Type);
} kOperations[] = {
    {"add", 2, binary_of<[](auto a, auto b) { return wrapping_add(a, b); }>},
    {"sub", 2, binary_of<[](auto a, auto b) { return wrapping_sub(a, b); }>},
    {"mul.lo", 2, binary_of<[](auto a, auto b) { return wrapping_mul(a, b); }>},
    {"mul.hi", 2, binary_of<[](auto a, auto b) { return mul_high(a, b); }>},
    {"mad.lo", 3,
     ternary_of<[](auto a, auto b, auto c) { return wrapping_add(wrapping_mul(a, b), c); }>},
    {"mad.hi", 3,
     ternary_of<[](auto a, auto b, auto c) { return wrapping_add(mul_high(a, b), c); }>},
    {"div", 2, binary_of<[](auto a, auto b) { return divide(a, b); }>},
    {"rem", 2, binary_of<[](auto a, auto b) { return remainder(a, b); }>},
    {"min", 2, binary_of<[](auto a, auto b) { return smaller(a, b); }>},
    {"max", 2, binary_of<[](auto a, auto b) { return larger(a, b); }>},
    {"sad", 3, ternary_of<[](auto a, auto b, auto c) { return sum_abs_difference(a, b, c); }>},
    {"abs", 1, unary_of<[](auto a) { return absolute(a); }>},
    {"neg", 1, unary_of<[](auto a) { return wrapping_sub<decltype(a)>(0, a); }>},
};
}  // namespace

void emit_integer(Lowering& lowering, const std::string& name, Type type) {
  for (auto& operation : kOperations)
    if (name == operation.name)
      return emit_simple(lowering, operation.handler(type), kClassInteger, type,
                         std::vector<Type>(operation.sources, type));
  lowering.unsupported();
}

static i32 saturating_sub(i32 a, i32 b) {
  i64 difference = (i64)a - b;
  return (i32)(difference > INT32_MAX   ? INT32_MAX
               : difference < INT32_MIN ? INT32_MIN
                                        : difference);
}
static i32 relu_min(i32 a, i32 b) { return larger(smaller(a, b), 0); }
static i32 relu_max(i32 a, i32 b) { return larger(larger(a, b), 0); }

// Two 16-bit integers in a word.
template <class T, auto F>
static void integer_pair(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32 *a = warp.source<u32>(instruction.operands[1]),
            *b = warp.source<u32>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    T low = F((T)a[lane], (T)b[lane]);
    T high = F((T)(a[lane] >> 16), (T)(b[lane] >> 16));
    if (instruction.modifiers & kModifierRelu) {
      if ((i16)low < 0) low = 0;
      if ((i16)high < 0) high = 0;
    }
    destination[lane] = (u32)(u16)low | ((u32)(u16)high << 16);
  });
}

template <class T>
static void execute_add_carry(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = add_with_carry<T>(warp, instruction, lane, a[lane], b[lane]);
  });
}
// The condition code holds the borrow.
template <class T>
static void execute_sub_carry(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    T difference = a[lane] - b[lane], borrow = carry_in(warp, instruction, lane);
    carry_out(warp, instruction, lane, a[lane] < b[lane] || difference < borrow);
    destination[lane] = difference - borrow;
  });
}
// c plus the products of four bytes.
template <class A, class B>
static i32 dot_four(u32 a, u32 b, i32 c) {
  u32 sum = (u32)c;
  for (int k = 0; k < 4; k++) sum += (u32)((i32)(A)(a >> (8 * k)) * (i32)(B)(b >> (8 * k)));
  return (i32)sum;
}
// c plus the products of two halves of a with two bytes of b; imm: the upper bytes.
template <class A, class B>
static i32 dot_two(const Instruction& instruction, u32 a, u32 b, u32 c) {
  u32 sum = c;
  if (instruction.imm) b >>= 16;
  for (int k = 0; k < 2; k++) {
    u16 half = (u16)(a >> (16 * k));
    sum += (u32)((std::is_signed_v<A> ? (i32)(i16)half : half) * (i32)(B)(b >> (8 * k)));
  }
  return (i32)sum;
}

void lower_integer_add(Lowering& lowering, const Statement& statement, Type type) {
  bool subtracts = statement.name()[0] == 's', is_wide = type_bytes(type) == 8;
  u32 carry = carry_of(statement);
  auto emit = [&](Handler sum, Handler difference, Type operands) {
    emit_simple(lowering, subtracts ? difference : sum, kClassInteger, operands,
                {operands, operands});
  };
  if (type == kU16x2) {
    emit(integer_pair<u16, wrapping_add<u16>>, integer_pair<u16, wrapping_sub<u16>>, kB32);
  } else if (type == kS16x2) {
    emit(integer_pair<i16, wrapping_add<i16>>, integer_pair<i16, wrapping_sub<i16>>, kB32);
  } else if (carry) {
    if (is_wide)
      emit(execute_add_carry<u64>, execute_sub_carry<u64>, type);
    else
      emit(execute_add_carry<u32>, execute_sub_carry<u32>, type);
    lowering.kernel.code.back().imm = carry;
  } else if (statement.has("sat")) {
    emit(binary<i32, i32, i32, saturating_add>, binary<i32, i32, i32, saturating_sub>, type);
  } else {
    emit_integer(lowering, subtracts ? "sub" : "add", type);
  }
}

void lower_integer_min(Lowering& lowering, const Statement& statement, Type type) {
  bool maximum = statement.name() == "max";
  auto emit = [&](Handler min, Handler max, Type operands) {
    emit_simple(lowering, maximum ? max : min, kClassInteger, operands, {operands, operands});
  };
  if (type == kU16x2)
    emit(integer_pair<u16, smaller<u16>>, integer_pair<u16, larger<u16>>, kB32);
  else if (type == kS16x2)
    emit(integer_pair<i16, smaller<i16>>, integer_pair<i16, larger<i16>>, kB32);
  else if (statement.has("relu") && type == kS32)
    emit(binary<i32, i32, i32, relu_min>, binary<i32, i32, i32, relu_max>, type);
  else
    emit_integer(lowering, statement.name(), type);
  lowering.kernel.code.back().modifiers |= float_modifiers(lowering);
}

void lower_integer_div(Lowering& lowering, const Statement& statement, Type type) {
  emit_integer(lowering, statement.name(), type);
}

void lower_integer_abs(Lowering& lowering, const Statement& statement, Type type) {
  emit_integer(lowering, statement.name(), type);
}

static void lower_sad(Lowering& lowering, const Statement& statement) {
  emit_integer(lowering, "sad", lowering.last_type());
}

static void lower_dp4a(Lowering& lowering, const Statement& statement) {
  auto types = lowering.types();
  bool a_signed = types[0] == kS32, b_signed = types[1] == kS32;
  Handler handler = a_signed ? (b_signed ? ternary<i32, u32, u32, i32, dot_four<i8, i8>>
                                         : ternary<i32, u32, u32, i32, dot_four<i8, u8>>)
                             : (b_signed ? ternary<i32, u32, u32, i32, dot_four<u8, i8>>
                                         : ternary<i32, u32, u32, i32, dot_four<u8, u8>>);
  emit_simple(lowering, handler, kClassInteger, kS32, {kB32, kB32, kS32});
}

static void lower_dp2a(Lowering& lowering, const Statement& statement) {
  auto types = lowering.types();
  bool a_signed = types[0] == kS32, b_signed = types[1] == kS32;
  Handler handler = a_signed ? (b_signed ? ternary_modified<i32, u32, dot_two<i8, i8>>
                                         : ternary_modified<i32, u32, dot_two<i8, u8>>)
                             : (b_signed ? ternary_modified<i32, u32, dot_two<u8, i8>>
                                         : ternary_modified<i32, u32, dot_two<u8, u8>>);
  emit_simple(lowering, handler, kClassInteger, kS32, {kB32, kB32, kS32});
  lowering.kernel.code.back().imm = statement.has("hi");
}

static const Opcodes kOpcodes{{"sad", lower_sad}, {"dp4a", lower_dp4a}, {"dp2a", lower_dp2a}};
}  // namespace ptxsim
