// Statements and functions in order; calls are inlined.
#include "lower/lowering.h"

#include <algorithm>

#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
Instruction& Lowering::emit(Handler handler, InstructionClass instruction_class,
                            const std::vector<i32>& ids, int ndst) {
  Instruction instruction;
  instruction.handler = handler;
  instruction.instruction_class = instruction_class;
  instruction.operand_ids = ids;
  if (ids.size() > 255) fail("too many operands");
  instruction.operand_count = (u8)ids.size();
  instruction.destinations = (u8)ndst;
  instruction.statement = current;
  instruction.line = current ? current->line : 0;
  instruction.source_line = current ? current->source_line : 0;
  instruction.source_file = current ? (u16)current->file : 0;
  kernel.code.push_back(std::move(instruction));
  return kernel.code.back();
}
Instruction& Lowering::emit(Handler handler, InstructionClass instruction_class,
                            std::initializer_list<i32> ids, int ndst) {
  return emit(handler, instruction_class, std::vector<i32>(ids), ndst);
}

std::vector<Type> Lowering::types() const {
  std::vector<Type> r;
  for (size_t i = 1; i < current->opcode.size(); i++) {
    Type type = type_from_name(current->opcode[i]);
    if (type != kNoType) r.push_back(type);
  }
  return r;
}
Type Lowering::last_type(int k) const {
  auto t = types();
  if ((int)t.size() <= k) const_cast<Lowering*>(this)->fail("instruction type missing");
  return t[t.size() - 1 - k];
}
Space Lowering::space() const {
  for (size_t i = 1; i < current->opcode.size(); i++) {
    const std::string& w = current->opcode[i];
    if (w == "global") return kGlobal;
    if (w == "shared" || w == "shared::cta" || w == "shared::cluster") return kShared;
    if (w == "local") return kLocal;
    if (w == "param" || w == "param::entry" || w == "param::func") return kParam;
    if (w == "const") return kConst;
  }
  return kGeneric;
}

void Lowering::lower_call(const Statement& statement) {
  auto var_of = [&](const Operand& operand) -> Location {
    if (operand.kind != Operand::kSymbol) fail("call arguments must be .param variables");
    auto it = frame->variables.find(operand.symbol);
    if (it == frame->variables.end()) fail("unknown call argument " + operand.symbol);
    return it->second;
  };
  if (statement.callee.empty()) fail("indirect calls are not supported");
  auto it = module.functions.find(statement.callee);
  const std::string& n = statement.callee;
  if (n == "vprintf") {
    emit(execute_vprintf, kClassOther,
         {constant(var_of(statement.call_arguments[0]).address, 8),
          constant(var_of(statement.call_arguments[1]).address, 8),
          constant(var_of(statement.call_returns[0]).address, 8)},
         0);
    return;
  }
  if (n == "__assertfail") {
    std::vector<i32> ids;
    for (auto& a : statement.call_arguments) ids.push_back(constant(var_of(a).address, 8));
    emit(execute_assert_fail, kClassOther, ids, 0);
    return;
  }
  if (n == "malloc" || n == "free") {
    emit(execute_assert_fail, kClassOther, {}, 0).imm = 1;
    return;
  }
  if (it == module.functions.end() || !it->second.has_body)
    fail("call of an undefined function " + n);
  for (auto& c : call_stack)
    if (c == n) fail("recursive call of " + n + " is not supported (calls are inlined)");
  if (call_stack.size() > 64) fail("call chain too deep");
  const Function& function = it->second;
  if (function.params.size() != statement.call_arguments.size() ||
      function.returns.size() < statement.call_returns.size())
    fail("argument count mismatch calling " + n);
  Frame nf;
  nf.inlined = true;
  for (size_t i = 0; i < function.params.size(); i++)
    nf.variables[function.params[i].name] = var_of(statement.call_arguments[i]);
  for (size_t i = 0; i < statement.call_returns.size(); i++)
    nf.variables[function.returns[i].name] = var_of(statement.call_returns[i]);
  for (size_t i = statement.call_returns.size(); i < function.returns.size(); i++) {
    Location l{kLocal, (kernel.local_bytes + 15) / 16 * 16, function.returns[i].size};
    kernel.local_bytes = (u32)(l.address + l.size);
    nf.variables[function.returns[i].name] = l;
  }
  u32 skip = ~0u;
  if (statement.predicate_register >= 0) {  // guarded call: jump over the inlined body
    Instruction& instruction = emit(nullptr, kClassControl, {}, 0);
    instruction.control = kBranch;
    instruction.predicate = frame->register_base + statement.predicate_register;
    instruction.predicate_negated = !statement.predicate_negated;
    skip = (u32)kernel.code.size() - 1;
  }
  Frame* save = frame;
  const Statement* save_s = current;
  lower_function(function, nf);
  frame = save;
  current = save_s;
  if (skip != ~0u) kernel.code[skip].target = (u32)kernel.code.size();
}

void Lowering::lower_statement(const Statement& statement) {
  current = &statement;
  const std::string& b = statement.name();
  size_t before = kernel.code.size(), regs_before = registers.size();
  pending_widening.clear();
  if (b == "call") {
    lower_call(statement);
    return;
  }
  if (b == "bra") {
    Instruction& instruction = emit(nullptr, kClassControl, {}, 0);
    instruction.control = kBranch;
    if (statement.operands.size() != 1 || statement.operands[0].kind != Operand::kSymbol)
      fail("bad branch target");
    frame->fixups.push_back(
        {(u32)kernel.code.size() - 1, {statement.scope, statement.operands[0].symbol}});
  } else if (b == "brx") {
    i32 idx = source(statement.operands[0], kU32);
    Instruction& instruction = emit(nullptr, kClassControl, {idx}, 0);
    instruction.control = kBranchIndexed;
    kernel.branch_tables.push_back(std::make_unique<std::vector<u32>>());
    kernel.code.back().aux = kernel.branch_tables.back().get();
    std::string tn = statement.operands[1].symbol;
    int sc = statement.scope;
    const std::vector<std::string>* tg = nullptr;
    for (int q = sc; q >= 0 && !tg; q = frame->function->scope_parent[q]) {
      auto it = frame->function->branch_targets.find({q, tn});
      if (it != frame->function->branch_targets.end()) tg = &it->second;
    }
    if (!tg) fail("unknown branch target list " + tn);
    u32 at = (u32)kernel.code.size() - 1;
    for (size_t i = 0; i < tg->size(); i++) {
      kernel.branch_tables.back()->push_back(0);
      frame->fixups.push_back({at, {sc, "\x01" + std::to_string(i) + "\x01" + (*tg)[i]}});
    }
  } else if (b == "ret" || b == "exit") {
    Instruction& instruction = emit(nullptr, kClassControl, {}, 0);
    if (b == "ret" && frame->inlined) {
      instruction.control = kBranch;
      frame->return_fixups.push_back((u32)kernel.code.size() - 1);
    } else
      instruction.control = kExit;
  } else {
    LowerFunction lower = find_lowering(statement);
    if (!lower) unsupported();
    lower(*this, statement);
  }
  // widening of results written to wider registers
  bool sgn = false;
  if (!pending_widening.empty()) {
    auto ts = types();
    if (!ts.empty()) sgn = b == "cvt" ? type_is_signed(ts[0]) : type_is_signed(ts.back());
  }
  for (auto& pn : pending_widening) {
    Instruction& instruction = emit(execute_widen, kClassMove, {pn.first, pn.second}, 1);
    auto ts = types();
    Type type = b == "cvt" ? ts[0] : ts.back();
    instruction.imm = sgn ? (u32)type_bytes(type) : 0;
  }
  pending_widening.clear();
  if (statement.predicate_register >= 0) {
    i32 pr = frame->register_base + statement.predicate_register;
    if (!registers[pr].is_predicate) fail("guard is not a predicate");
    // operand set-up writes temporaries of this statement and need not be guarded
    for (size_t i = before; i < kernel.code.size(); i++) {
      Instruction& instruction = kernel.code[i];
      bool setup =
          (instruction.handler == execute_narrow || instruction.handler == execute_widen ||
           instruction.handler == execute_sreg || instruction.handler == execute_pred_not) &&
          instruction.operand_ids[0] >= (i32)regs_before;
      if (setup) continue;
      instruction.predicate = pr;
      instruction.predicate_negated = statement.predicate_negated;
    }
  }
}

void Lowering::lower_function(const Function& function, Frame& scope) {
  frame = &scope;
  scope.function = &function;
  call_stack.push_back(function.name);
  scope.register_base = (i32)registers.size();
  for (auto& r : function.registers) {
    VirtualRegister v;
    v.is_predicate = r.type == kPredicate;
    v.slot = v.is_predicate ? 4 : slot_for(r.type);
    registers.push_back(v);
  }
  for (auto& variable : function.variables) {
    Location l;
    l.space = variable.space;
    l.size = variable.size;
    if (variable.space == kLocal || variable.space == kParam) {
      u32 al = std::max<u32>(variable.align, 8);
      l.space = kLocal;
      l.address = (kernel.local_bytes + al - 1) / al * al;
      kernel.local_bytes = (u32)(l.address + variable.size);
    } else if (variable.space == kShared) {
      auto key = function.name + "/" + variable.name;
      auto it = shared_locations.find(key);
      if (it != shared_locations.end())
        l = it->second;
      else {
        if (variable.unsized_extern) {
          fail("extern shared arrays inside functions are not supported");
        }
        shared_top = (shared_top + variable.align - 1) / variable.align * variable.align;
        l.address = shared_top;
        shared_top += (u32)variable.size;
        shared_locations[key] = l;
        std::string shown = variable.name.substr(0, variable.name.find('$'));
        kernel.shared_variables.push_back({shown, (u32)l.address, (u32)l.size});
      }
    } else {
      auto it = module_data.addresses.find(function.name + "/" + variable.name);
      if (it == module_data.addresses.end()) {
        current = nullptr;
        fail("internal: function-scope global without storage");
      }
      l.address = it->second;
    }
    scope.variables[variable.name] = l;
  }
  scope.statement_pc.assign(function.statements.size() + 1, 0);
  for (size_t i = 0; i < function.statements.size(); i++) {
    scope.statement_pc[i] = (int)kernel.code.size();
    const Statement& statement = function.statements[i];
    if (statement.kind == Statement::kLabel) {
      kernel.labels.push_back({(u32)kernel.code.size(), statement.label});
      continue;
    }
    lower_statement(statement);
    frame = &scope;
  }
  scope.statement_pc[function.statements.size()] = (int)kernel.code.size();
  current = nullptr;
  if (!scope.inlined) {
    Instruction& instruction = emit(nullptr, kClassControl, {}, 0);
    instruction.control = kExit;
    instruction.line =
        function.statements.empty() ? function.line : function.statements.back().line;
  }
  for (u32 q : scope.return_fixups) kernel.code[q].target = (u32)kernel.code.size();
  if (scope.inlined && !scope.return_fixups.empty())
    emit(execute_nop, kClassControl, {}, 0);  // a landing place after the body
  for (auto& fx : scope.fixups) {
    std::string name = fx.second.second;
    int slot = -1;
    if (name[0] == '\x01') {
      size_t e = name.find('\x01', 1);
      slot = atoi(name.c_str() + 1);
      name = name.substr(e + 1);
    }
    int pc = -1;
    for (int sc = fx.second.first; sc >= 0; sc = function.scope_parent[sc]) {
      auto it = function.labels.find({sc, name});
      if (it != function.labels.end()) {
        pc = scope.statement_pc[it->second];
        break;
      }
    }
    if (pc < 0) {  // labels in enclosing-scope children (rare): any unique match
      for (auto& l : function.labels)
        if (l.first.second == name) pc = scope.statement_pc[l.second];
    }
    if (pc < 0) {
      current = kernel.code[fx.first].statement;
      fail("unknown label " + name);
    }
    if (slot >= 0)
      (*const_cast<std::vector<u32>*>((const std::vector<u32>*)kernel.code[fx.first].aux))[slot] =
          (u32)pc;
    else
      kernel.code[fx.first].target = (u32)pc;
  }
  call_stack.pop_back();
}

}  // namespace ptxsim
