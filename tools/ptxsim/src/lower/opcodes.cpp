#include "lower/opcodes.h"

namespace ptxsim {
// A function's static, since the objects that fill it are initialized in any order.
static std::unordered_map<std::string, LowerFunction>& opcode_table() {
  static std::unordered_map<std::string, LowerFunction> table;
  return table;
}

Opcodes::Opcodes(std::initializer_list<std::pair<const char*, LowerFunction>> entries) {
  for (const auto& [opcode, function] : entries) opcode_table().emplace(opcode, function);
}

LowerFunction find_lowering(const Statement& statement) {
  LowerFunction found = nullptr;
  std::string opcode;
  for (const std::string& word : statement.opcode) {
    opcode += opcode.empty() ? word : "." + word;
    auto entry = opcode_table().find(opcode);
    if (entry != opcode_table().end()) found = entry->second;
  }
  return found;
}
}  // namespace ptxsim
