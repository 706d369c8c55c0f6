// Variables, registers and parameters.
#include "ptx/parser.h"

namespace ptxsim {
Space space_of(const std::string& directive) {
  if (directive == ".global") return kGlobal;
  if (directive == ".shared") return kShared;
  if (directive == ".local") return kLocal;
  if (directive == ".param") return kParam;
  if (directive == ".const") return kConst;
  return kGeneric;
}

void Parser::variable_declaration(Space space, bool is_extern, bool at_module_scope) {
  const VariableType declared = variable_type();
  do {
    const std::string name = identifier();
    Variable declared_variable = variable(declared);
    declared_variable.space = space;
    declared_variable.is_extern = is_extern;
    if (at_module_scope)
      declare_in_module(name, declared_variable);
    else
      declare_in_function(name, declared_variable);
  } while (accept(','));
  expect(';');
}

// The directives between the state space and the first name.
Parser::VariableType Parser::variable_type() {
  VariableType result;
  while (peek() == '.') {
    const std::string name = directive();
    if (name == ".align")
      result.align = (u32)integer_constant();
    else if (name == ".v2")
      result.vector = 2;
    else if (name == ".v4")
      result.vector = 4;
    else if (name == ".attribute")
      skip_past(')');
    else if (name == ".ptr")
      continue;
    else if (name == ".texref" || name == ".samplerref" || name == ".surfref")
      fail("texture/surface objects are not supported");
    else if ((result.type = type_from_name(name.substr(1))) == kNoType)
      fail("unexpected directive " + name);
  }
  return result;
}

// The number of elements of an array of any dimensions, 1 for a scalar. The length in [] is not
// known: unsized.
u64 Parser::array_length(bool& unsized) {
  u64 count = 1;
  unsized = false;
  while (accept('[')) {
    if (accept(']')) {
      unsized = true;
      continue;
    }
    count *= (u64)integer_constant();
    expect(']');
  }
  return count;
}

// What follows the name of a variable: its length and its initial value.
Variable Parser::variable(const VariableType& declared) {
  Variable result;
  u64 count = array_length(result.unsized_extern);
  const int element_bytes = type_bytes(declared.type);
  result.align = declared.align ? declared.align : element_bytes * declared.vector;
  if (!result.align) result.align = 1;
  if (accept('=')) {
    initializer(result, declared.type);
    if (result.unsized_extern && !result.init.empty()) {
      count = result.init.size() / element_bytes;
      result.unsized_extern = false;
    }
  }
  result.size = result.unsized_extern ? 0 : count * element_bytes * declared.vector;
  if (result.init.size() < result.size && !result.init.empty()) result.init.resize(result.size);
  return result;
}

void Parser::declare_in_module(const std::string& name, const Variable& variable) {
  const bool known = module->variables.count(name);
  if (known && variable.is_extern) return;  // declared after its definition
  if (!known) module->variable_order.push_back(name);
  module->variables[name] = variable;
  module->variables[name].name = name;
}

// Blocks may declare a name again, so that the function keeps them under unique names.
void Parser::declare_in_function(const std::string& name, Variable variable) {
  variable.name = format("%s$%zu", name.c_str(), function->variables.size());
  scopes.back().variables[name] = variable.name;
  function->variables.push_back(variable);
}

void Parser::register_declaration() {
  const std::string type_directive = directive();
  if (type_directive == ".v2" || type_directive == ".v4")
    fail("vector registers are not supported");
  const Type type = type_from_name(type_directive.substr(1));
  if (type == kNoType) fail("unknown register type " + type_directive);
  do {
    const std::string name = identifier();
    const i32 first = (i32)function->registers.size();
    if (!accept('<')) {
      scopes.back().registers[name] = first;
      function->registers.push_back({type, name});
      continue;
    }
    const i32 count = (i32)integer_constant();
    expect('>');
    scopes.back().register_ranges[name] = {first, count};
    for (i32 i = 0; i < count; i++) function->registers.push_back({type, name + std::to_string(i)});
  } while (accept(','));
  expect(';');
}

void Parser::parameter_list(std::vector<Variable>& parameters, char close) {
  while (peek() != close) {
    parameters.push_back(parameter());
    if (!accept(',')) break;
  }
  expect(close);
}

Variable Parser::parameter() {
  const std::string space = directive();
  if (space != ".param" && space != ".reg") fail("expected .param");
  const VariableType declared = parameter_type();
  const int element_bytes = type_bytes(declared.type);
  Variable result;
  result.space = kParam;
  result.name = identifier();
  bool unsized;
  const u64 count = array_length(unsized);
  result.size = unsized ? 0 : count * element_bytes;
  result.align = declared.align ? declared.align : std::max(1, element_bytes);
  if (space == ".reg") fail(".reg parameters are not supported");
  return result;
}

// The type of a parameter, and what a pointer says of its target, which is of no use here.
Parser::VariableType Parser::parameter_type() {
  VariableType result;
  while (peek() == '.') {
    const std::string name = directive();
    if (name == ".align")
      result.align = (u32)integer_constant();
    else if (name == ".ptr" || (space_of(name) != kGeneric && name != ".param"))
      continue;
    else if ((result.type = type_from_name(name.substr(1))) == kNoType)
      fail("unexpected " + name);
  }
  return result;
}
}  // namespace ptxsim
