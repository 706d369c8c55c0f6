// Operands of a statement as operands of an instruction: registers, constants, addresses.
#include <bit>

#include "instructions/moves.h"
#include "lower/lowering.h"

namespace ptxsim {
i32 Lowering::temporary(u8 slot) {
  registers.push_back({slot, false});
  return (i32)registers.size() - 1;
}
i32 Lowering::temporary_predicate() {
  registers.push_back({4, true});
  return (i32)registers.size() - 1;
}

i32 Lowering::constant(u64 low, u8 slot, u64 high) {
  const Constant value{slot == 4 ? (u32)low : low, high, slot};
  auto [entry, is_new] = constant_ids.try_emplace(value, -1 - (i32)constants.size());
  if (is_new) constants.push_back(value);
  return entry->second;
}
i32 Lowering::constant_predicate(bool value) { return constant(value ? kFullMask : 0, 0); }

i32 Lowering::source(const Operand& operand, Type type) {
  if (type == kPredicate) return predicate_source(operand);
  const u8 need = slot_for(type);
  switch (operand.kind) {
    case Operand::kRegister:
      return register_source(operand, need);
    case Operand::kSpecialRegister:
      return special_register_source(operand, need);
    case Operand::kInteger:
      return integer_source(operand, type);
    case Operand::kFloat:
      return float_source(operand, type);
    case Operand::kDouble:
      return double_source(operand, type);
    case Operand::kSymbol:
      return symbol_source(operand, need);
    case Operand::kVector:  // {a} is a
      if (operand.elements.size() == 1) return source(operand.elements[0], type);
      fail("vector operand where a scalar is needed");
    default:
      fail("bad operand");
  }
}

i32 Lowering::narrowed(i32 id, u8 have, u8 need) {
  const i32 narrow = temporary(need);
  Instruction& instruction = emit(execute_narrow, kClassMove, {narrow, id}, 1);
  instruction.imm = have;
  instruction.imm2 = need;
  return narrow;
}

i32 Lowering::register_source(const Operand& operand, u8 need) {
  const i32 id = register_id(operand);
  if (registers[id].is_predicate) fail("predicate used as a value");
  const u8 have = registers[id].slot;
  if (have < need) fail(format("register of %d bytes where %d are needed", have, need));
  return have == need ? id : narrowed(id, have, need);
}

i32 Lowering::special_register_source(const Operand& operand, u8 need) {
  u8 have;
  const int code = special_register_code(operand.symbol, have);
  if (code < 0) fail("unsupported special register " + operand.symbol);
  const i32 value = temporary(have);
  emit(execute_sreg, kClassMove, {value}, 1).imm = (u32)code;
  if (have == need) return value;
  if (have > need) return narrowed(value, have, need);
  const i32 wide = temporary(need);
  emit(execute_widen, kClassMove, {wide, value}, 1).imm = 0;
  return wide;
}

// Where a float is expected, the float of that value.
i32 Lowering::integer_source(const Operand& operand, Type type) {
  const i64 value = (i64)operand.bits;
  if (type == kF32) return constant(std::bit_cast<u32>((float)value), 4);
  if (type == kF64) return constant(std::bit_cast<u64>((double)value), 8);
  const u8 need = slot_for(type);
  const int bytes = type_bytes(type);
  if (bytes < 4) return constant(operand.bits & ((1ull << (8 * bytes)) - 1), need);
  return constant(operand.bits, need, need == 16 && value < 0 ? ~0ull : 0);
}

i32 Lowering::float_source(const Operand& operand, Type type) {
  if (type != kF64) return constant(operand.bits, slot_for(type));
  return constant(std::bit_cast<u64>((double)std::bit_cast<float>((u32)operand.bits)), 8);
}

i32 Lowering::double_source(const Operand& operand, Type type) {
  if (type == kF32)
    return constant(std::bit_cast<u32>((float)std::bit_cast<double>(operand.bits)), 4);
  if (slot_for(type) != 8) fail("floating-point literal of the wrong size");
  return constant(operand.bits, 8);
}

i32 Lowering::symbol_source(const Operand& operand, u8 need) {
  Space space;
  u64 address;
  if (symbol_address(operand.symbol, space, address))
    return constant(address + (u64)operand.offset, need);
  if (module.functions.count(operand.symbol))
    fail("taking the address of function " + operand.symbol + " (indirect calls) is not supported");
  fail("unknown symbol " + operand.symbol);
}

i32 Lowering::destination(const Operand& operand, Type type) {
  const u8 need = slot_for(type);
  if (operand.kind == Operand::kSink) return temporary(need);
  if (operand.kind == Operand::kVector && operand.elements.size() == 1)
    return destination(operand.elements[0], type);
  if (operand.kind != Operand::kRegister) fail("destination must be a register");
  const i32 id = register_id(operand);
  if (registers[id].is_predicate) fail("predicate where a data register is needed");
  const u8 have = registers[id].slot;
  if (have == need) return id;
  if (have < need) fail(format("destination register of %d bytes where %d are needed", have, need));
  const i32 narrow = temporary(need);
  pending_widening.push_back({id, narrow});
  return narrow;
}

i32 Lowering::predicate_source(const Operand& operand) {
  if (operand.kind == Operand::kInteger)
    return constant_predicate((operand.bits != 0) != operand.negated);
  if (operand.kind != Operand::kRegister) fail("predicate expected");
  const i32 id = register_id(operand);
  if (!registers[id].is_predicate) fail("predicate expected");
  if (!operand.negated) return id;
  const i32 negation = temporary_predicate();
  emit(execute_pred_not, kClassPredicate, {negation, id}, 1);
  return negation;
}
i32 Lowering::predicate_destination(const Operand& operand) {
  if (operand.kind == Operand::kSink) return temporary_predicate();
  if (operand.kind != Operand::kRegister || !registers[register_id(operand)].is_predicate)
    fail("predicate destination expected");
  return register_id(operand);
}

Space Lowering::memory_space(const Operand& memory, Space named) {
  if (memory.kind != Operand::kMemory) fail("memory operand expected");
  if (named != kParam || memory.elements[0].kind != Operand::kSymbol) return named;
  Space space;
  u64 address;
  return symbol_address(memory.elements[0].symbol, space, address) ? space : named;
}

i32 Lowering::address_base(const Operand& memory, Space space, i64& offset) {
  if (memory.kind != Operand::kMemory) fail("memory operand expected");
  const Operand& base = memory.elements[0];
  offset = memory.offset;
  if (base.kind == Operand::kRegister) {
    const i32 id = register_id(base);
    if (registers[id].is_predicate || registers[id].slot > 8) fail("bad address register");
    return id;
  }
  if (base.kind == Operand::kInteger) return constant(base.bits, 8);
  if (base.kind == Operand::kSpecialRegister) return source(base, kB64);
  if (base.kind != Operand::kSymbol) fail("bad address operand");
  Space own_space;
  u64 address;
  if (!symbol_address(base.symbol, own_space, address)) fail("unknown symbol " + base.symbol);
  if (space == kGeneric && own_space == kShared) address |= kSharedWin;
  if (space == kGeneric && own_space == kLocal) address |= kLocalWin;
  return constant(address, 8);
}
}  // namespace ptxsim
