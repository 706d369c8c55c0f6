// Comparisons: setp and set.
#include <type_traits>

#include "instructions/half.h"
#include "instructions/handlers.h"

namespace ptxsim {
enum Comparison {
  kCompareEq,
  kCompareNe,
  kCompareLt,
  kCompareLe,
  kCompareGt,
  kCompareGe,
  kCompareEqu,
  kCompareNeu,
  kCompareLtu,
  kCompareLeu,
  kCompareGtu,
  kCompareGeu,
  kCompareNum,
  kCompareNan,
  kCompareBad
};
static Comparison comparison_from_name(const std::string& name) {
  static const std::unordered_map<std::string, Comparison> names = {
      {"eq", kCompareEq},   {"ne", kCompareNe},   {"lt", kCompareLt},   {"le", kCompareLe},
      {"gt", kCompareGt},   {"ge", kCompareGe},   {"equ", kCompareEqu}, {"neu", kCompareNeu},
      {"ltu", kCompareLtu}, {"leu", kCompareLeu}, {"gtu", kCompareGtu}, {"geu", kCompareGeu},
      {"num", kCompareNum}, {"nan", kCompareNan}, {"lo", kCompareLt},   {"ls", kCompareLe},
      {"hi", kCompareGt},   {"hs", kCompareGe}};
  auto found = names.find(name);
  return found == names.end() ? kCompareBad : found->second;
}
template <class T, int C>
static inline bool compare(T a, T b) {
  if constexpr (C == kCompareEq)
    return a == b;
  else if constexpr (C == kCompareNe) {
    if constexpr (std::is_floating_point_v<T>)
      return a == a && b == b && a != b;
    else
      return a != b;
  } else if constexpr (C == kCompareLt)
    return a < b;
  else if constexpr (C == kCompareLe)
    return a <= b;
  else if constexpr (C == kCompareGt)
    return a > b;
  else if constexpr (C == kCompareGe)
    return a >= b;
  else if constexpr (C == kCompareEqu)
    return !(a == a && b == b) || a == b;
  else if constexpr (C == kCompareNeu)
    return a != b;
  else if constexpr (C == kCompareLtu)
    return !(a >= b);
  else if constexpr (C == kCompareLeu)
    return !(a > b);
  else if constexpr (C == kCompareGtu)
    return !(a <= b);
  else if constexpr (C == kCompareGeu)
    return !(a < b);
  else if constexpr (C == kCompareNum)
    return a == a && b == b;
  else
    return a != a || b != b;
}
// fetches a float from f16/bf16/f32 lanes with optional ftz
template <int K>
static inline float float_operand(const Instruction& instruction, const u32* slot, int lane,
                                  int half = 0) {
  if (K == 2) {
    float value = bits_to<float>(slot[lane]);
    return (instruction.modifiers & kModifierFtz) ? flush_subnormal(value) : value;
  }
  u16 bits = (u16)(half ? slot[lane] >> 16 : slot[lane]);
  if (instruction.modifiers & kModifierFtz) bits = half_ftz<K == 2 ? 0 : K>(bits);
  return half_to_float<K == 2 ? 0 : K>(bits);
}
// setp's operands: p, q, a, b, c; imm: how a comparison is combined with c (0 not, 1 and, 2 or, 3
// xor); imm2: whether q is written.
static u32 combined(Warp& warp, const Instruction& instruction, u32 comparison) {
  u32 c = read_predicate(warp, instruction.operands[4]);
  switch (instruction.imm) {
    case 0:
      return comparison;
    case 1:
      return comparison & c;
    case 2:
      return comparison | c;
    default:
      return comparison ^ c;
  }
}
static void finish_setp(Warp& warp, const Instruction& instruction, u32 lanes, u32 result) {
  u32 p = combined(warp, instruction, result), q = combined(warp, instruction, ~result);
  write_predicate(warp, instruction.operands[0], p, lanes);
  if (instruction.imm2) write_predicate(warp, instruction.operands[1], q, lanes);
}
template <class T, int C>
static void execute_setp(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void *a = warp.source(instruction.operands[2]), *b = warp.source(instruction.operands[3]);
  u32 result = 0;
  for_each_lane(lanes, [&](int lane) {
    result |= (u32)compare<T, C>(read_lane<T>(a, lane), read_lane<T>(b, lane)) << lane;
  });
  finish_setp(warp, instruction, lanes, result);
}
template <int K, int C>
static void execute_setp_f(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32 *a = warp.source<u32>(instruction.operands[2]),
            *b = warp.source<u32>(instruction.operands[3]);
  u32 result = 0;
  for_each_lane(lanes, [&](int lane) {
    result |= (u32)compare<float, C>(float_operand<K>(instruction, a, lane),
                                     float_operand<K>(instruction, b, lane))
              << lane;
  });
  finish_setp(warp, instruction, lanes, result);
}
// f16x2 comparison: p <- low halves, q <- high halves
template <int K, int C>
static void execute_setp_x2(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u32 *a = warp.source<u32>(instruction.operands[2]),
            *b = warp.source<u32>(instruction.operands[3]);
  u32 low = 0, high = 0;
  for_each_lane(lanes, [&](int lane) {
    low |= (u32)compare<float, C>(float_operand<K>(instruction, a, lane),
                                  float_operand<K>(instruction, b, lane))
           << lane;
    high |= (u32)compare<float, C>(float_operand<K>(instruction, a, lane, 1),
                                   float_operand<K>(instruction, b, lane, 1))
            << lane;
  });
  low = combined(warp, instruction, low);
  high = combined(warp, instruction, high);
  write_predicate(warp, instruction.operands[0], low, lanes);
  write_predicate(warp, instruction.operands[1], high, lanes);
}
// The handler that f makes for a comparison out of a list; null for any other.
template <int... kComparisons, class F>
static Handler by_comparison(Comparison comparison, F f) {
  Handler handler = nullptr;
  ((comparison == kComparisons ? (void)(handler = f(std::integral_constant<int, kComparisons>()))
                               : (void)0),
   ...);
  return handler;
}
template <class F>
static Handler by_integer_comparison(Comparison comparison, F f) {
  return by_comparison<kCompareEq, kCompareNe, kCompareLt, kCompareLe, kCompareGt, kCompareGe>(
      comparison, f);
}
template <class F>
static Handler by_float_comparison(Comparison comparison, F f) {
  return by_comparison<kCompareEq, kCompareNe, kCompareLt, kCompareLe, kCompareGt, kCompareGe,
                       kCompareEqu, kCompareNeu, kCompareLtu, kCompareLeu, kCompareGtu, kCompareGeu,
                       kCompareNum, kCompareNan>(comparison, f);
}
template <class T>
static Handler pick_setp_integer(Comparison comparison) {
  return by_integer_comparison(comparison, [](auto c) -> Handler { return execute_setp<T, c()>; });
}
static Handler pick_setp(Type type, Comparison comparison) {
  switch (type) {
    case kU16:
    case kB16:
      return pick_setp_integer<u16>(comparison);
    case kS16:
      return pick_setp_integer<i16>(comparison);
    case kU32:
    case kB32:
      return pick_setp_integer<u32>(comparison);
    case kS32:
      return pick_setp_integer<i32>(comparison);
    case kU64:
    case kB64:
      return pick_setp_integer<u64>(comparison);
    case kS64:
      return pick_setp_integer<i64>(comparison);
    case kF32:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp_f<2, c()>; });
    case kF64:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp<double, c()>; });
    case kF16:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp_f<0, c()>; });
    case kBf16:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp_f<1, c()>; });
    case kF16x2:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp_x2<0, c()>; });
    case kBf16x2:
      return by_float_comparison(comparison,
                                 [](auto c) -> Handler { return execute_setp_x2<1, c()>; });
    default:
      return nullptr;
  }
}

// set: result from a predicate. imm: 0 integer all-ones, 1 f32 1.0, 2 f16, 3 bf16
static void execute_set_res(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  u32 predicate = read_predicate(warp, instruction.operands[1]);
  static const u32 ones[] = {0xffffffffu, 0x3f800000u, 0x3c00u, 0x3f80u};
  u32 value = ones[instruction.imm];
  for_each_lane(lanes, [&](int lane) { destination[lane] = (predicate >> lane) & 1 ? value : 0; });
}
static void execute_set_x2_res(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  u32 p = read_predicate(warp, instruction.operands[1]),
      q = read_predicate(warp, instruction.operands[2]);
  u32 value = instruction.imm == 0 ? 0xffff : instruction.imm == 2 ? 0x3c00 : 0x3f80;
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = ((p >> lane) & 1 ? value : 0) | ((q >> lane) & 1 ? value << 16 : 0);
  });
}

static void lower_setp(Lowering& lowering, const Statement& statement) {
  // setp.Cmp{.ftz}.type p[|q], a, b   or   setp.Cmp.Bool{.ftz}.type p[|q], a, b, [!]c
  Comparison comparison = comparison_from_name(statement.opcode[1]);
  if (comparison == kCompareBad) lowering.fail("unknown comparison ." + statement.opcode[1]);
  int bool_op = statement.has("and") ? 1 : statement.has("or") ? 2 : statement.has("xor") ? 3 : 0;
  Type type = lowering.last_type();
  Handler handler = pick_setp(type, comparison);
  if (!handler) lowering.unsupported();
  i32 a = lowering.source(statement.operands[1], type),
      b = lowering.source(statement.operands[2], type),
      c = bool_op ? lowering.predicate_source(statement.operands[3])
                  : lowering.constant_predicate(false);
  i32 p, q;
  bool has_q = false;
  if (statement.operands[0].kind == Operand::kPair) {
    p = lowering.predicate_destination(statement.operands[0].elements[0]);
    q = lowering.predicate_destination(statement.operands[0].elements[1]);
    has_q = true;
  } else {
    p = lowering.predicate_destination(statement.operands[0]);
    q = lowering.temporary_predicate();
  }
  Instruction& instruction = lowering.emit(handler, kClassPredicate, {p, q, a, b, c}, 2);
  instruction.imm = (u32)bool_op;
  instruction.imm2 = has_q;
  instruction.modifiers = float_modifiers(lowering);
}

static void lower_set(Lowering& lowering, const Statement& statement) {
  Comparison comparison = comparison_from_name(statement.opcode[1]);
  if (comparison == kCompareBad) lowering.unsupported();
  int bool_op = statement.has("and") ? 1 : statement.has("or") ? 2 : statement.has("xor") ? 3 : 0;
  auto types = lowering.types();
  Type destination_type = types[0], source_type = types.size() > 1 ? types[1] : types[0];
  Handler handler = pick_setp(source_type, comparison);
  if (!handler) lowering.unsupported();
  bool is_pair = source_type == kF16x2 || source_type == kBf16x2;
  i32 a = lowering.source(statement.operands[1], source_type),
      b = lowering.source(statement.operands[2], source_type),
      c = bool_op ? lowering.predicate_source(statement.operands[3])
                  : lowering.constant_predicate(false);
  i32 p = lowering.temporary_predicate(), q = lowering.temporary_predicate();
  Instruction& instruction = lowering.emit(handler, kClassPredicate, {p, q, a, b, c}, 2);
  instruction.imm = (u32)bool_op;
  instruction.imm2 = 0;
  instruction.modifiers = float_modifiers(lowering);
  u32 kind = destination_type == kF32                                   ? 1
             : destination_type == kF16 || destination_type == kF16x2   ? 2
             : destination_type == kBf16 || destination_type == kBf16x2 ? 3
                                                                        : 0;
  if (is_pair)
    lowering
        .emit(execute_set_x2_res, kClassPredicate,
              {lowering.destination(statement.operands[0], kB32), p, q}, 1)
        .imm = kind;
  else
    lowering
        .emit(execute_set_res, kClassPredicate,
              {lowering.destination(statement.operands[0], destination_type), p}, 1)
        .imm = kind;
}

static const Opcodes kOpcodes{{"setp", lower_setp}, {"set", lower_set}};
}  // namespace ptxsim
