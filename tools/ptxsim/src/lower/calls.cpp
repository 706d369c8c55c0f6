// Calls: the body of the function takes their place.
#include "instructions/moves.h"
#include "lower/lowering.h"

namespace ptxsim {
Lowering::Location Lowering::call_argument(const Operand& operand) {
  if (operand.kind != Operand::kSymbol) fail("call arguments must be .param variables");
  auto found = frame->variables.find(operand.symbol);
  if (found == frame->variables.end()) fail("unknown call argument " + operand.symbol);
  return found->second;
}
i32 Lowering::call_argument_address(const Operand& operand) {
  return constant(call_argument(operand).address, 8);
}

// The functions that CUDA provides. Returns false for any other.
bool Lowering::lower_system_call(const Statement& statement) {
  const std::vector<Operand>& arguments = statement.call_arguments;
  if (statement.callee == "vprintf") {
    const i32 text = call_argument_address(arguments[0]);
    const i32 values = call_argument_address(arguments[1]);
    const i32 result = call_argument_address(statement.call_returns[0]);
    emit(execute_vprintf, kClassOther, {text, values, result}, 0);
  } else if (statement.callee == "__assertfail") {
    std::vector<i32> ids;
    for (const Operand& argument : arguments) ids.push_back(call_argument_address(argument));
    emit(execute_assert_fail, kClassOther, ids, 0);
  } else if (statement.callee == "malloc" || statement.callee == "free") {
    emit(execute_assert_fail, kClassOther, {}, 0).imm = 1;
  } else {
    return false;
  }
  return true;
}

const Function& Lowering::callee(const Statement& statement) {
  constexpr size_t kDeepest = 64;
  const std::string& name = statement.callee;
  auto found = module.functions.find(name);
  if (found == module.functions.end() || !found->second.has_body)
    fail("call of an undefined function " + name);
  for (const std::string& caller : call_stack)
    if (caller == name) fail("recursive call of " + name + " is not supported (calls are inlined)");
  if (call_stack.size() > kDeepest) fail("call chain too deep");
  const Function& function = found->second;
  if (function.params.size() != statement.call_arguments.size() ||
      function.returns.size() < statement.call_returns.size())
    fail("argument count mismatch calling " + name);
  return function;
}

// Parameters and results stand where the caller has them; results that the caller does not take
// get a place of their own.
void Lowering::bind_parameters(const Statement& statement, const Function& function,
                               Frame& entered) {
  for (size_t i = 0; i < function.params.size(); i++)
    entered.variables[function.params[i].name] = call_argument(statement.call_arguments[i]);
  for (size_t i = 0; i < function.returns.size(); i++) {
    const Variable& result = function.returns[i];
    entered.variables[result.name] = i < statement.call_returns.size()
                                         ? call_argument(statement.call_returns[i])
                                         : local_location(result.size, 16);
  }
}

void Lowering::lower_call(const Statement& statement) {
  if (statement.callee.empty()) fail("indirect calls are not supported");
  if (lower_system_call(statement)) return;
  const Function& function = callee(statement);
  Frame entered;
  entered.inlined = true;
  bind_parameters(statement, function, entered);
  const size_t first_pc = kernel.code.size();
  const bool guarded = statement.predicate_register >= 0;
  if (guarded) {  // jumps over the body where the predicate is false
    Instruction& skip = emit_control(kBranch);
    skip.predicate = frame->register_base + statement.predicate_register;
    skip.predicate_negated = !statement.predicate_negated;
  }
  Frame* caller = frame;
  lower_function(function, entered);
  frame = caller;
  current = &statement;
  if (guarded) kernel.code[first_pc].target = (u32)kernel.code.size();
}
}  // namespace ptxsim
