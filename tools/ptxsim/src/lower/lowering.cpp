// Functions and statements in order.
#include "lower/lowering.h"

#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
Instruction& Lowering::emit(Handler handler, InstructionClass instruction_class,
                            const std::vector<i32>& ids, int destinations) {
  if (ids.size() > 255) fail("too many operands");
  Instruction instruction;
  instruction.handler = handler;
  instruction.instruction_class = instruction_class;
  instruction.operand_ids = ids;
  instruction.operand_count = (u8)ids.size();
  instruction.destinations = (u8)destinations;
  instruction.statement = current;
  if (current) {
    instruction.line = current->line;
    instruction.source_line = current->source_line;
    instruction.source_file = (u16)current->file;
  }
  kernel.code.push_back(std::move(instruction));
  return kernel.code.back();
}
Instruction& Lowering::emit(Handler handler, InstructionClass instruction_class,
                            std::initializer_list<i32> ids, int destinations) {
  return emit(handler, instruction_class, std::vector<i32>(ids), destinations);
}
Instruction& Lowering::emit_control(Control control) {
  Instruction& instruction = emit(nullptr, kClassControl, {}, 0);
  instruction.control = control;
  return instruction;
}

std::vector<Type> Lowering::types() const {
  std::vector<Type> named;
  for (size_t i = 1; i < current->opcode.size(); i++) {
    const Type type = type_from_name(current->opcode[i]);
    if (type != kNoType) named.push_back(type);
  }
  return named;
}
Type Lowering::last_type(int from_end) const {
  const std::vector<Type> named = types();
  if ((int)named.size() <= from_end) fail("instruction type missing");
  return named[named.size() - 1 - from_end];
}
Space Lowering::space() const {
  for (size_t i = 1; i < current->opcode.size(); i++) {
    const std::string& word = current->opcode[i];
    if (word == "global") return kGlobal;
    if (word == "shared" || word == "shared::cta" || word == "shared::cluster") return kShared;
    if (word == "local") return kLocal;
    if (word == "param" || word == "param::entry" || word == "param::func") return kParam;
    if (word == "const") return kConst;
  }
  return kGeneric;
}

// Emits a function where the code stands. Its parameters have their places in the frame.
void Lowering::lower_function(const Function& function, Frame& entered) {
  frame = &entered;
  frame->function = &function;
  call_stack.push_back(function.name);
  declare_registers(function);
  for (const Variable& variable : function.variables) place_variable(variable);
  lower_statements(function);
  end_function(function);
  resolve_branches();
  call_stack.pop_back();
}

void Lowering::declare_registers(const Function& function) {
  frame->register_base = (i32)registers.size();
  for (const Register& declared : function.registers)
    registers.push_back({slot_for(declared.type), declared.type == kPredicate});
}

void Lowering::lower_statements(const Function& function) {
  for (const Statement& statement : function.statements) {
    frame->statement_pc.push_back((u32)kernel.code.size());
    if (statement.kind == Statement::kLabel)
      kernel.labels.push_back({(u32)kernel.code.size(), statement.label});
    else
      lower_statement(statement);
  }
}

// A kernel may end without ret.
void Lowering::end_function(const Function& function) {
  current = nullptr;
  if (frame->inlined) return;
  emit_control(kExit).line =
      function.statements.empty() ? function.line : function.statements.back().line;
}

void Lowering::lower_statement(const Statement& statement) {
  current = &statement;
  pending_widening.clear();
  if (statement.name() == "call") {
    lower_call(statement);
    return;
  }
  const size_t first_pc = kernel.code.size(), first_temporary = registers.size();
  if (!lower_control(statement)) {
    const LowerFunction lower = find_lowering(statement);
    if (!lower) unsupported();
    lower(*this, statement);
  }
  widen_results();
  if (statement.predicate_register >= 0) guard(first_pc, first_temporary);
}

// Branches and ends. Returns false for any other statement.
bool Lowering::lower_control(const Statement& statement) {
  const std::string& name = statement.name();
  if (name == "bra")
    lower_branch(statement);
  else if (name == "brx")
    lower_indexed_branch(statement);
  else if (name == "ret")
    lower_return();
  else if (name == "exit")
    emit_control(kExit);
  else
    return false;
  return true;
}

// Extends results in registers that are wider than the result: by its sign or by zeros.
void Lowering::widen_results() {
  if (pending_widening.empty()) return;
  const std::vector<Type> named = types();
  Type result = kNoType;
  if (!named.empty()) result = current->name() == "cvt" ? named.front() : named.back();
  const u32 signed_bytes = type_is_signed(result) ? (u32)type_bytes(result) : 0;
  for (const Widening& widening : pending_widening)
    emit(execute_widen, kClassMove, {widening.wide, widening.narrow}, 1).imm = signed_bytes;
  pending_widening.clear();
}

// Puts the instructions of the current statement under its predicate.
void Lowering::guard(size_t first_pc, size_t first_temporary) {
  const i32 predicate = frame->register_base + current->predicate_register;
  if (!registers[predicate].is_predicate) fail("guard is not a predicate");
  for (size_t pc = first_pc; pc < kernel.code.size(); pc++) {
    Instruction& instruction = kernel.code[pc];
    const bool prepares =
        instruction.handler == execute_narrow || instruction.handler == execute_widen ||
        instruction.handler == execute_sreg || instruction.handler == execute_pred_not;
    // It writes a temporary of this statement, which nobody reads where the predicate is false.
    if (prepares && instruction.operand_ids[0] >= (i32)first_temporary) continue;
    instruction.predicate = predicate;
    instruction.predicate_negated = current->predicate_negated;
  }
}
}  // namespace ptxsim
