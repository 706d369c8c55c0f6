// Branches, and their labels once all of the function is lowered.
#include "instructions/moves.h"
#include "lower/lowering.h"

namespace ptxsim {
void Lowering::lower_branch(const Statement& statement) {
  if (statement.operands.size() != 1 || statement.operands[0].kind != Operand::kSymbol)
    fail("bad branch target");
  emit_control(kBranch);
  const u32 pc = (u32)kernel.code.size() - 1;
  frame->fixups.push_back({pc, statement.scope, statement.operands[0].symbol, nullptr});
}

void Lowering::lower_indexed_branch(const Statement& statement) {
  const i32 index = source(statement.operands[0], kU32);
  Instruction& instruction = emit(nullptr, kClassControl, {index}, 0);
  const u32 pc = (u32)kernel.code.size() - 1;
  const std::vector<std::string>& labels = branch_targets(statement);
  auto table = std::make_unique<std::vector<u32>>(labels.size());
  instruction.control = kBranchIndexed;
  instruction.aux = table.get();
  for (size_t i = 0; i < labels.size(); i++)
    frame->fixups.push_back({pc, statement.scope, labels[i], &(*table)[i]});
  kernel.branch_tables.push_back(std::move(table));
}

// The labels in the list that a brx.idx names, which stands in its block or in one around it.
const std::vector<std::string>& Lowering::branch_targets(const Statement& statement) {
  const Function& function = *frame->function;
  const std::string& list = statement.operands[1].symbol;
  for (int scope = statement.scope; scope >= 0; scope = function.scope_parent[scope]) {
    auto found = function.branch_targets.find({scope, list});
    if (found != function.branch_targets.end()) return found->second;
  }
  fail("unknown branch target list " + list);
}

// The end of an inlined function is a branch to what follows the call.
void Lowering::lower_return() {
  emit_control(frame->inlined ? kBranch : kExit);
  if (frame->inlined) frame->return_branches.push_back((u32)kernel.code.size() - 1);
}

u32 Lowering::label_pc(const Fixup& fixup) {
  const Function& function = *frame->function;
  for (int scope = fixup.scope; scope >= 0; scope = function.scope_parent[scope]) {
    auto found = function.labels.find({scope, fixup.label});
    if (found != function.labels.end()) return frame->statement_pc[found->second];
  }
  // A label in another block than those around the branch: the last of that name.
  for (auto label = function.labels.rbegin(); label != function.labels.rend(); ++label)
    if (label->first.second == fixup.label) return frame->statement_pc[label->second];
  current = kernel.code[fixup.pc].statement;
  fail("unknown label " + fixup.label);
}

// Writes the targets of the function's branches; the code after the function comes next.
void Lowering::resolve_branches() {
  for (u32 pc : frame->return_branches) kernel.code[pc].target = (u32)kernel.code.size();
  if (frame->inlined && !frame->return_branches.empty())
    emit(execute_nop, kClassControl, {}, 0);  // a landing place after the body
  for (const Fixup& fixup : frame->fixups) {
    u32& target = fixup.target ? *fixup.target : kernel.code[fixup.pc].target;
    target = label_pc(fixup);
  }
}
}  // namespace ptxsim
