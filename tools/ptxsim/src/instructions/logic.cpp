// Logic on words and predicates, and shifts.
#include <type_traits>

#include "instructions/integer_types.h"
#include "instructions/moves.h"

namespace ptxsim {
template <class T>
static T shift_left(T a, u32 b) {
  return b >= 8 * sizeof(T) ? 0 : (T)(a << b);
}
template <class T>
static T shift_right(T a, u32 b) {
  if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? (T)-1 : 0;
  return (T)(a >> b);
}
template <int OP>
static void execute_pred_bin(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 a = read_predicate(warp, instruction.operands[1]),
      b = read_predicate(warp, instruction.operands[2]);
  write_predicate(warp, instruction.operands[0], OP == 0 ? a & b : OP == 1 ? a | b : a ^ b, lanes);
}
static Handler pick_shr(Type type) {
  return by_integer_type(type, [](auto zero) -> Handler {
    using T = decltype(zero);
    return binary<T, T, u32, shift_right<T>>;
  });
}
static void execute_lop3(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32 *a = warp.source<u32>(instruction.operands[1]),
            *b = warp.source<u32>(instruction.operands[2]),
            *c = warp.source<u32>(instruction.operands[3]);
  u32 table = instruction.imm;
  for_each_lane(lanes, [&](int lane) {
    u32 result = 0;
    u32 x = a[lane];
    u32 y = b[lane];
    u32 z = c[lane];
    if (table & 1) result |= ~x & ~y & ~z;
    if (table & 2) result |= ~x & ~y & z;
    if (table & 4) result |= ~x & y & ~z;
    if (table & 8) result |= ~x & y & z;
    if (table & 16) result |= x & ~y & ~z;
    if (table & 32) result |= x & ~y & z;
    if (table & 64) result |= x & y & ~z;
    if (table & 128) result |= x & y & z;
    destination[lane] = result;
  });
  if (instruction.imm2) {  // lop3.BoolOp: p = (result != 0) op q
    u32 result = 0, other = read_predicate(warp, instruction.operands[5]);
    for_each_lane(lanes, [&](int lane) { result |= (u32)(destination[lane] != 0) << lane; });
    write_predicate(warp, instruction.operands[4],
                    instruction.imm2 == 1 ? result | other : result & other, lanes);
  }
}

static void lower_and(Lowering& lowering, const Statement& statement) {
  auto is = [&](const char* name) { return statement.name() == name; };
  Type type = lowering.last_type();
  int operation = is("and") ? 0 : is("or") ? 1 : 2;
  if (type == kPredicate) {
    i32 a = lowering.predicate_source(statement.operands[1]),
        c = lowering.predicate_source(statement.operands[2]);
    lowering.emit(operation == 0   ? execute_pred_bin<0>
                  : operation == 1 ? execute_pred_bin<1>
                                   : execute_pred_bin<2>,
                  kClassPredicate, {lowering.predicate_destination(statement.operands[0]), a, c},
                  1);
    return;
  }
  if (type_bytes(type) == 8)
    emit_simple(lowering,
                operation == 0   ? binary<u64, u64, u64, [](u64 a, u64 b) { return a & b; }>
                : operation == 1 ? binary<u64, u64, u64, [](u64 a, u64 b) { return a | b; }>
                                 : binary<u64, u64, u64, [](u64 a, u64 b) { return a ^ b; }>,
                kClassInteger, type, {type, type});
  else if (type_bytes(type) == 2)
    emit_simple(lowering,
                operation == 0   ? binary<u16, u16, u16, [](u16 a, u16 b) { return (u16)(a & b); }>
                : operation == 1 ? binary<u16, u16, u16, [](u16 a, u16 b) { return (u16)(a | b); }>
                                 : binary<u16, u16, u16, [](u16 a, u16 b) { return (u16)(a ^ b); }>,
                kClassInteger, type, {type, type});
  else
    emit_simple(lowering,
                operation == 0   ? binary<u32, u32, u32, [](u32 a, u32 b) { return a & b; }>
                : operation == 1 ? binary<u32, u32, u32, [](u32 a, u32 b) { return a | b; }>
                                 : binary<u32, u32, u32, [](u32 a, u32 b) { return a ^ b; }>,
                kClassInteger, type, {type, type});
}

static void lower_not(Lowering& lowering, const Statement& statement) {
  auto is = [&](const char* name) { return statement.name() == name; };
  Type type = lowering.last_type();
  if (type == kPredicate) {
    i32 a = lowering.predicate_source(statement.operands[1]);
    lowering.emit(execute_pred_not, kClassPredicate,
                  {lowering.predicate_destination(statement.operands[0]), a}, 1);
    return;
  }
  if (is("not"))
    emit_simple(lowering,
                type_bytes(type) == 8   ? unary<u64, u64, [](u64 a) { return ~a; }>
                : type_bytes(type) == 2 ? unary<u16, u16, [](u16 a) { return (u16)~a; }>
                                        : unary<u32, u32, [](u32 a) { return ~a; }>,
                kClassInteger, type, {type});
  else
    emit_simple(lowering,
                type_bytes(type) == 8   ? unary<u64, u64, [](u64 a) { return (u64)!a; }>
                : type_bytes(type) == 2 ? unary<u16, u16, [](u16 a) { return (u16)!a; }>
                                        : unary<u32, u32, [](u32 a) { return (u32)!a; }>,
                kClassInteger, type, {type});
}

static void lower_shl(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering,
              type_bytes(type) == 8   ? binary<u64, u64, u32, shift_left<u64>>
              : type_bytes(type) == 2 ? binary<u16, u16, u32, shift_left<u16>>
                                      : binary<u32, u32, u32, shift_left<u32>>,
              kClassInteger, type, {type, kU32});
}

static void lower_shr(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering, pick_shr(type), kClassInteger, type, {type, kU32});
}

static void lower_lop3(Lowering& lowering, const Statement& statement) {
  i32 p = -1, q = -1;
  const Operand* result = &statement.operands[0];
  i32 a = lowering.source(statement.operands[1], kB32),
      b = lowering.source(statement.operands[2], kB32),
      c = lowering.source(statement.operands[3], kB32);
  u32 lut = (u32)statement.operands[4].bits;
  if (statement.operands[4].kind != Operand::kInteger)
    lowering.fail("lop3 needs an immediate table");
  u32 bool_op = 0;
  if (statement.operands.size() > 5) {
    bool_op = statement.has("or") ? 1 : 2;
    q = lowering.predicate_source(statement.operands[5]);
    if (result->kind != Operand::kPair) lowering.fail("lop3.BoolOp needs d|p");
    p = lowering.predicate_destination(result->elements[1]);
    result = &result->elements[0];
  }
  if (p < 0) p = q = lowering.constant_predicate(false);
  i32 destination = lowering.destination(*result, kB32);
  Instruction& instruction =
      lowering.emit(execute_lop3, kClassInteger, {destination, a, b, c, p, q}, 1);
  if (bool_op) {
    instruction.operand_ids = {destination, a, b, c, p, q};
    instruction.reads_destination = true;
    instruction.destinations = 5;
  }  // keeps every operand live across the instruction
  instruction.imm = lut;
  instruction.imm2 = bool_op;
}

static const Opcodes kOpcodes{{"and", lower_and}, {"or", lower_and},   {"xor", lower_and},
                              {"not", lower_not}, {"cnot", lower_not}, {"shl", lower_shl},
                              {"shr", lower_shr}, {"lop3", lower_lop3}};
}  // namespace ptxsim
