// Operands of a statement as operands of an instruction: registers, constants, addresses.
#include <algorithm>

#include "instructions/moves.h"
#include "lower/lowering.h"

namespace ptxsim {
i32 Lowering::constant(u64 lo, u8 slot, u64 hi) {
  if (slot == 4) lo &= 0xffffffffu;
  auto key = std::make_tuple(lo, hi, slot);
  auto it = constant_index.find(key);
  if (it != constant_index.end()) return it->second;
  constants.push_back({lo, hi});
  constant_slots.push_back(slot);
  return constant_index[key] = -(i32)constants.size();
}
i32 Lowering::constant_predicate(bool v) { return constant(v ? kFullMask : 0, 0); }

bool Lowering::symbol_address(const std::string& n, Space& sp, u64& addr) {
  auto it = frame->variables.find(n);
  if (it != frame->variables.end()) {
    sp = it->second.space;
    addr = it->second.address;
    return true;
  }
  auto g = module_data.addresses.find(n);
  if (g != module_data.addresses.end()) {
    auto v = module.variables.find(n);
    sp = v != module.variables.end() ? v->second.space : kGlobal;
    addr = g->second;
    return true;
  }
  auto v = module.variables.find(n);
  if (v != module.variables.end() && v->second.space == kShared) {
    auto s = shared_locations.find(n);
    if (s == shared_locations.end()) {
      Location l;
      l.space = kShared;
      l.size = v->second.size;
      if (v->second.unsized_extern || v->second.is_extern) {
        uses_dynamic = true;
        dynamic_align = std::max(dynamic_align, v->second.align);
        l.address = ~0ull;  // patched in a first pass, see lowerKernel
        fail("internal: dynamic shared memory was not laid out");
      }
      shared_top = (shared_top + v->second.align - 1) / v->second.align * v->second.align;
      l.address = shared_top;
      shared_top += (u32)v->second.size;
      kernel.shared_variables.push_back({n, (u32)l.address, (u32)l.size});
      s = shared_locations.emplace(n, l).first;
    }
    sp = kShared;
    addr = s->second.address;
    return true;
  }
  return false;
}

i32 Lowering::source(const Operand& operand, Type type) {
  if (type == kPredicate) return predicate_source(operand);
  u8 need = slot_for(type);
  switch (operand.kind) {
    case Operand::kRegister: {
      i32 id = register_id(operand);
      if (registers[id].is_predicate) fail("predicate used as a value");
      u8 have = registers[id].slot;
      if (have == need) return id;
      if (have > need) {
        i32 n = temporary(need);
        emit(execute_narrow, kClassMove, {n, id}, 1).imm = have;
        kernel.code.back().imm2 = need;
        return n;
      }
      fail(format("register of %d bytes where %d are needed", have, need));
    }
    case Operand::kSpecialRegister: {
      u8 slot;
      int c = special_register_code(operand.symbol, slot);
      if (c < 0) fail("unsupported special register " + operand.symbol);
      i32 n = temporary(slot);
      emit(execute_sreg, kClassMove, {n}, 1).imm = (u32)c;
      if (slot == need) return n;
      i32 n2 = temporary(need);
      if (slot > need) {
        Instruction& instruction = emit(execute_narrow, kClassMove, {n2, n}, 1);
        instruction.imm = slot;
        instruction.imm2 = need;
      } else
        emit(execute_widen, kClassMove, {n2, n}, 1).imm = 0;
      return n2;
    }
    case Operand::kInteger:
      if (type == kF32 || type == kF64) {  // integer literal in a floating context: value
        if (type == kF32) {
          float f = (float)(i64)operand.bits;
          u32 b;
          memcpy(&b, &f, 4);
          return constant(b, 4);
        }
        double d = (double)(i64)operand.bits;
        u64 b;
        memcpy(&b, &d, 8);
        return constant(b, 8);
      }
      if (need == 4 && type_bytes(type) < 4)
        return constant(operand.bits & ((1ull << (8 * type_bytes(type))) - 1), 4);
      return constant(operand.bits, need, need == 16 && (i64)operand.bits < 0 ? ~0ull : 0);
    case Operand::kFloat: {
      if (need == 8) {
        float f;
        u32 b = (u32)operand.bits;
        memcpy(&f, &b, 4);
        double d = f;
        u64 q;
        memcpy(&q, &d, 8);
        return constant(type == kF64 ? q : operand.bits, 8);
      }
      return constant(operand.bits, need);
    }
    case Operand::kDouble: {
      double d;
      memcpy(&d, &operand.bits, 8);
      if (type == kF32) {
        float f = (float)d;
        u32 b;
        memcpy(&b, &f, 4);
        return constant(b, 4);
      }
      if (need == 8) return constant(operand.bits, 8);
      fail("floating-point literal of the wrong size");
    }
    case Operand::kSymbol: {
      Space space;
      u64 a;
      if (!symbol_address(operand.symbol, space, a)) {
        if (module.functions.count(operand.symbol))
          fail("taking the address of function " + operand.symbol +
               " (indirect calls) is not supported");
        fail("unknown symbol " + operand.symbol);
      }
      return constant(a + (u64)operand.offset, need);
    }
    case Operand::kVector: {  // {a,b} given where a packed value is wanted
      if (operand.elements.size() == 1) return source(operand.elements[0], type);
      fail("vector operand where a scalar is needed");
    }
    default:
      fail("bad operand");
  }
}

i32 Lowering::destination(const Operand& operand, Type type) {
  u8 need = slot_for(type);
  if (operand.kind == Operand::kSink) return temporary(need);
  if (operand.kind == Operand::kVector && operand.elements.size() == 1)
    return destination(operand.elements[0], type);
  if (operand.kind != Operand::kRegister) fail("destination must be a register");
  i32 id = register_id(operand);
  if (registers[id].is_predicate) fail("predicate where a data register is needed");
  if (registers[id].slot == need) return id;
  if (registers[id].slot > need) {  // wider destination: sign- or zero-extend afterwards
    i32 n = temporary(need);
    pending_widening.push_back({id, n});
    return n;
  }
  fail(format("destination register of %d bytes where %d are needed", registers[id].slot, need));
}

i32 Lowering::predicate_source(const Operand& operand) {
  if (operand.kind == Operand::kInteger)
    return constant_predicate((operand.bits != 0) != operand.negated);
  if (operand.kind != Operand::kRegister) fail("predicate expected");
  i32 id = register_id(operand);
  if (!registers[id].is_predicate) fail("predicate expected");
  if (!operand.negated) return id;
  i32 n = temporary_predicate();
  emit(execute_pred_not, kClassPredicate, {n, id}, 1);
  return n;
}
i32 Lowering::predicate_destination(const Operand& operand) {
  if (operand.kind == Operand::kSink) return temporary_predicate();
  if (operand.kind != Operand::kRegister || !registers[register_id(operand)].is_predicate)
    fail("predicate destination expected");
  return register_id(operand);
}

Space Lowering::memory_space(const Operand& mem, Space dflt) {
  if (dflt == kParam && mem.elements[0].kind == Operand::kSymbol) {
    Space space;
    u64 a;
    if (symbol_address(mem.elements[0].symbol, space, a)) return space;
  }
  return dflt;
}

i32 Lowering::address_base(const Operand& mem, Space space, i64& off) {
  if (mem.kind != Operand::kMemory) fail("memory operand expected");
  const Operand& b = mem.elements[0];
  off = mem.offset;
  if (b.kind == Operand::kRegister) {
    i32 id = register_id(b);
    if (registers[id].is_predicate || registers[id].slot > 8) fail("bad address register");
    return id;
  }
  if (b.kind == Operand::kInteger) return constant(b.bits, 8);
  if (b.kind == Operand::kSymbol) {
    Space s;
    u64 a;
    if (!symbol_address(b.symbol, s, a)) fail("unknown symbol " + b.symbol);
    if (space == kGeneric && s == kShared) a |= kSharedWin;
    if (space == kGeneric && s == kLocal) a |= kLocalWin;
    return constant(a, 8);
  }
  if (b.kind == Operand::kSpecialRegister) return source(b, kB64);
  fail("bad address operand");
}

}  // namespace ptxsim
