// Moves, packing of vectors, and selections.
#include "checks.h"
#include "instructions/handlers.h"
#include "instructions/moves.h"

namespace ptxsim {
void execute_nop(Warp&, const Instruction&, u32) {}
void execute_mov32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = a[lane]; });
}
void execute_mov64(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* destination = warp.destination<u64>(instruction.operands[0]);
  const u64* a = warp.source<u64>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = a[lane]; });
}
static void execute_mov128(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* destination = warp.destination<u64>(instruction.operands[0]);
  const u64* a = warp.source<u64>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) {
    destination[2 * lane] = a[2 * lane];
    destination[2 * lane + 1] = a[2 * lane + 1];
  });
}
// 4-byte slot -> 8-byte slot; imm: bytes to sign-extend from (0: zero-extend)
void execute_widen(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* destination = warp.destination<u64>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  switch (instruction.imm) {
    case 1:
      for_each_lane(lanes, [&](int lane) { destination[lane] = (u64)(i64)(i8)a[lane]; });
      break;
    case 2:
      for_each_lane(lanes, [&](int lane) { destination[lane] = (u64)(i64)(i16)a[lane]; });
      break;
    case 4:
      for_each_lane(lanes, [&](int lane) { destination[lane] = (u64)(i64)(i32)a[lane]; });
      break;
    default:
      for_each_lane(lanes, [&](int lane) { destination[lane] = a[lane]; });
      break;
  }
}
// imm: source slot, imm2: destination slot
void execute_narrow(Warp& warp, const Instruction& instruction, u32 lanes) {
  if (instruction.imm == 8) {
    u32* destination = warp.destination<u32>(instruction.operands[0]);
    const u64* a = warp.source<u64>(instruction.operands[1]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)a[lane]; });
  } else if (instruction.imm2 == 4) {
    u32* destination = warp.destination<u32>(instruction.operands[0]);
    const u64* a = warp.source<u64>(instruction.operands[1]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)a[2 * lane]; });
  } else {
    u64* destination = warp.destination<u64>(instruction.operands[0]);
    const u64* a = warp.source<u64>(instruction.operands[1]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = a[2 * lane]; });
  }
}
void execute_pred_not(Warp& warp, const Instruction& instruction, u32 lanes) {
  write_predicate(warp, instruction.operands[0], ~read_predicate(warp, instruction.operands[1]),
                  lanes);
}
static void execute_pred_mov(Warp& warp, const Instruction& instruction, u32 lanes) {
  write_predicate(warp, instruction.operands[0], read_predicate(warp, instruction.operands[1]),
                  lanes);
}

// Packing and unpacking; imm: bytes of an element.
static void execute_pack(Warp& warp, const Instruction& instruction, u32 lanes) {
  int count = instruction.operand_count - 1, element_bytes = (int)instruction.imm;
  int bytes = count * element_bytes;
  for_each_lane(lanes, [&](int lane) {
    u64 lo = 0;
    u64 hi = 0;
    for (int k = 0; k < count; k++) {
      const void* a = warp.source(instruction.operands[1 + k]);
      u64 value = element_bytes == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane];
      if (element_bytes < 8) value &= (1ull << (8 * element_bytes)) - 1;
      int shift = 8 * element_bytes * k;
      if (shift < 64)
        lo |= value << shift;
      else
        hi |= value << (shift - 64);
    }
    void* destination = warp.destination(instruction.operands[0]);
    if (bytes <= 4)
      ((u32*)destination)[lane] = (u32)lo;
    else if (bytes == 8)
      ((u64*)destination)[lane] = lo;
    else {
      ((u64*)destination)[2 * lane] = lo;
      ((u64*)destination)[2 * lane + 1] = hi;
    }
  });
}
// Operands: the destinations, the source.
static void execute_unpack(Warp& warp, const Instruction& instruction, u32 lanes) {
  int count = instruction.operand_count - 1, element_bytes = (int)instruction.imm,
      bytes = count * element_bytes;
  const void* a = warp.source(instruction.operands[count]);
  for_each_lane(lanes, [&](int lane) {
    u64 lo;
    u64 hi = 0;
    if (bytes <= 4)
      lo = ((const u32*)a)[lane];
    else if (bytes == 8)
      lo = ((const u64*)a)[lane];
    else {
      lo = ((const u64*)a)[2 * lane];
      hi = ((const u64*)a)[2 * lane + 1];
    }
    for (int k = 0; k < count; k++) {
      int shift = 8 * element_bytes * k;
      u64 value = shift < 64 ? lo >> shift : hi >> (shift - 64);
      void* destination = warp.destination(instruction.operands[k]);
      if (element_bytes == 8)
        ((u64*)destination)[lane] = value;
      else if (element_bytes == 4)
        ((u32*)destination)[lane] = (u32)value;
      else
        ((u32*)destination)[lane] = (u32)(value & ((1u << (8 * element_bytes)) - 1));
    }
  });
}

template <class T>
static void execute_selp(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  u32 p = read_predicate(warp, instruction.operands[3]);
  if (__builtin_expect(taint_on(warp), 0)) {
    u32 tainted = (taint_lanes(warp, instruction.operands[1]) & p) |
                  (taint_lanes(warp, instruction.operands[2]) & ~p) |
                  taint_lanes(warp, instruction.operands[3]);
    set_taint(warp, instruction.operands[0], lanes, tainted,
              (taint_lanes(warp, instruction.operands[3]) & lanes)
                  ? taint_origin_of(warp, instruction.operands[3])
              : (taint_lanes(warp, instruction.operands[1]) & p & lanes)
                  ? taint_origin_of(warp, instruction.operands[1])
                  : taint_origin_of(warp, instruction.operands[2]));
  }
  for_each_lane(lanes, [&](int lane) { destination[lane] = (p >> lane) & 1 ? a[lane] : b[lane]; });
}
template <class T, class C>
static void execute_slct(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  const C* c = warp.source<C>(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = c[lane] >= 0 ? a[lane] : b[lane]; });
}

static Type element_type(int bytes) {
  return bytes == 8 ? kB64 : bytes == 4 ? kB32 : bytes == 2 ? kB16 : kB8;
}

static void lower_unpack(Lowering& lowering, const Operand& destination, const Operand& source,
                         Type type) {
  int count = (int)destination.elements.size(), element_bytes = type_bytes(type) / count;
  i32 whole = lowering.source(source, type);
  std::vector<i32> ids;
  for (auto& element : destination.elements)
    ids.push_back(lowering.destination(element, element_type(element_bytes)));
  ids.push_back(whole);
  lowering.emit(execute_unpack, kClassMove, ids, count).imm = (u32)element_bytes;
}

static void lower_pack(Lowering& lowering, const Operand& destination, const Operand& source,
                       Type type) {
  int element_bytes = type_bytes(type) / (int)source.elements.size();
  std::vector<i32> ids;
  for (auto& element : source.elements)
    ids.push_back(lowering.source(element, element_type(element_bytes)));
  ids.insert(ids.begin(), lowering.destination(destination, type));
  lowering.emit(execute_pack, kClassMove, ids, 1).imm = (u32)element_bytes;
}

// The address of a parameter of an inlined function, which lives in local memory; the high bit
// marks it. False for any other source.
static bool lower_parameter_address(Lowering& lowering, const Operand& destination,
                                    const Operand& source, Type type) {
  if (source.kind != Operand::kSymbol || !lowering.frame->inlined) return false;
  Space space;
  u64 address;
  if (!lowering.symbol_address(source.symbol, space, address) || space != kLocal) return false;
  bool is_parameter = false;
  for (auto& parameter : lowering.frame->function->params)
    is_parameter |= parameter.name == source.symbol;
  if (!is_parameter) return false;
  u64 marked = (address + (u64)source.offset) | 0x80000000u;
  i32 value = lowering.constant(marked, (u8)type_bytes(type));
  lowering.emit(execute_mov64, kClassMove, {lowering.destination(destination, type), value}, 1);
  return true;
}

static void lower_move(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  const Operand &destination = statement.operands[0], &a = statement.operands[1];
  if (type == kPredicate) {
    i32 predicate = lowering.predicate_source(a);
    lowering.emit(execute_pred_mov, kClassPredicate,
                  {lowering.predicate_destination(destination), predicate}, 1);
    return;
  }
  if (destination.kind == Operand::kVector) return lower_unpack(lowering, destination, a, type);
  if (a.kind == Operand::kVector && a.elements.size() > 1)
    return lower_pack(lowering, destination, a, type);
  if (a.kind == Operand::kSpecialRegister && a.symbol == "%is_explicit_cluster") {
    u8 slot;
    u32 code = (u32)special_register_code(a.symbol, slot);
    lowering.emit(execute_sreg, kClassPredicate, {lowering.predicate_destination(destination)}, 1)
        .imm = code;
    return;
  }
  if (lower_parameter_address(lowering, destination, a, type)) return;
  i32 value = lowering.source(a, type);
  int bytes = type_bytes(type);
  Handler handler = bytes == 16 ? execute_mov128 : bytes == 8 ? execute_mov64 : execute_mov32;
  lowering.emit(handler, kClassMove, {lowering.destination(destination, type), value}, 1);
}

static void lower_selp(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  i32 a = lowering.source(statement.operands[1], type),
      b = lowering.source(statement.operands[2], type),
      p = lowering.predicate_source(statement.operands[3]);
  lowering
      .emit(type_bytes(type) == 8 ? execute_selp<u64> : execute_selp<u32>, kClassMove,
            {lowering.destination(statement.operands[0], type), a, b, p}, 1)
      .propagates_taint = true;
}

static void lower_slct(Lowering& lowering, const Statement& statement) {
  auto types = lowering.types();
  Type type = types[0], condition_type = types[1];
  bool is_wide = type_bytes(type) == 8;
  i32 a = lowering.source(statement.operands[1], type),
      b = lowering.source(statement.operands[2], type),
      c = lowering.source(statement.operands[3], condition_type);
  lowering.emit(condition_type == kF32
                    ? (is_wide ? execute_slct<u64, float> : execute_slct<u32, float>)
                    : (is_wide ? execute_slct<u64, i32> : execute_slct<u32, i32>),
                kClassMove, {lowering.destination(statement.operands[0], type), a, b, c}, 1);
}

static const Opcodes kOpcodes{{"mov", lower_move}, {"selp", lower_selp}, {"slct", lower_slct}};
}  // namespace ptxsim
