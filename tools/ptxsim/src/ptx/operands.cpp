// Operands: registers, special registers, literals, addresses, vectors.
#include <cstdlib>

#include "ptx/parser.h"

namespace ptxsim {
static bool is_special_register(const std::string& name) {
  static const char* const kPrefixes[] = {"%tid",
                                          "%ntid",
                                          "%laneid",
                                          "%warpid",
                                          "%nwarpid",
                                          "%ctaid",
                                          "%nctaid",
                                          "%smid",
                                          "%nsmid",
                                          "%gridid",
                                          "%lanemask_",
                                          "%clock",
                                          "%globaltimer",
                                          "%cluster_",
                                          "%clusterid",
                                          "%nclusterid",
                                          "%is_explicit_cluster",
                                          "%dynamic_smem_size",
                                          "%total_smem_size",
                                          "%aggr_smem_size",
                                          "%reserved_smem_offset",
                                          "%envreg",
                                          "%pm",
                                          "%current_graph_exec"};
  for (const char* prefix : kPrefixes)
    if (name.starts_with(prefix)) return true;
  return false;
}

i32 Parser::find_register(const std::string& name) {
  size_t digits = name.size();  // where the number at the end begins
  while (digits > 0 && isdigit((unsigned char)name[digits - 1])) digits--;
  for (size_t i = scopes.size(); i-- > 0;) {
    auto single = scopes[i].registers.find(name);
    if (single != scopes[i].registers.end()) return single->second;
    if (digits == name.size()) continue;
    auto range = scopes[i].register_ranges.find(name.substr(0, digits));
    if (range == scopes[i].register_ranges.end()) continue;
    const i32 index = atoi(name.c_str() + digits);
    if (index < range->second.count) return range->second.first + index;
  }
  return -1;
}

// The unique name of a variable of the function; names of the module stay as they are.
std::string Parser::find_variable(const std::string& name) {
  for (size_t i = scopes.size(); i-- > 0;) {
    auto found = scopes[i].variables.find(name);
    if (found != scopes[i].variables.end()) return found->second;
  }
  return name;
}

Operand Parser::operand() {
  const char next = peek();
  Operand result;
  if (accept('{')) {
    result.kind = Operand::kVector;
    operand_list(result.elements, '}');
    return result;
  }
  if (accept('[')) return memory_operand();
  if (next == '(') {
    result.kind = Operand::kInteger;
    result.bits = (u64)integer_constant();
    return result;
  }
  if (accept('!')) {
    result = operand();
    result.negated = !result.negated;
    return result;
  }
  if (next == '-' || next == '+' || isdigit((unsigned char)next)) return number_operand();
  return named_operand();
}

// Operands between commas, up to a closing character, which is read too.
void Parser::operand_list(std::vector<Operand>& list, char close) {
  if (accept(close)) return;
  do list.push_back(operand());
  while (accept(','));
  expect(close);
}

// [base + offset, coordinates...], after the bracket.
Operand Parser::memory_operand() {
  Operand result;
  result.kind = Operand::kMemory;
  Operand base = operand();
  for (;;) {
    if (accept('+'))
      result.offset += integer_constant();
    else if (accept('-'))
      result.offset -= integer_constant();
    else
      break;
  }
  if (base.kind == Operand::kSymbol) {
    result.offset += base.offset;
    base.offset = 0;
  }
  result.elements.push_back(base);
  while (accept(',')) result.elements.push_back(operand());
  expect(']');
  return result;
}

Operand Parser::number_operand() {
  Operand result;
  if (!number(result)) fail("bad number");
  if (result.kind == Operand::kInteger)
    while (accept('*')) result.bits *= (u64)integer_constant();
  return result;
}

Operand Parser::named_operand() {
  const std::string name = identifier();
  Operand result;
  if (name == "_") {
    result.kind = Operand::kSink;
    return result;
  }
  if (name == "WARP_SZ") {
    result.kind = Operand::kInteger;
    result.bits = 32;
    return result;
  }
  const i32 id = find_register(name);
  if (id >= 0) return register_operand(id);
  if (is_special_register(name)) return special_register(name);
  return symbol_operand(name);
}

// A register, or two of them: d|p.
Operand Parser::register_operand(i32 id) {
  Operand result;
  result.kind = Operand::kRegister;
  result.register_id = id;
  if (current() == '.') fail("register component selectors are not supported");
  if (current() != '|') return result;
  position++;
  Operand pair;
  pair.kind = Operand::kPair;
  pair.elements = {result, operand()};
  return pair;
}

Operand Parser::special_register(std::string name) {
  while (current() == '.') {
    position++;
    name += "." + identifier();
  }
  Operand result;
  result.kind = Operand::kSpecialRegister;
  result.symbol = name;
  return result;
}

// A variable or a label, with the offset that may follow it.
Operand Parser::symbol_operand(const std::string& name) {
  Operand result;
  result.kind = Operand::kSymbol;
  result.symbol = find_variable(name);
  const Mark start = mark();
  if (!accept('+')) return result;
  Operand offset;
  if (number(offset))
    result.offset = (i64)offset.bits;
  else
    back_to(start);
  return result;
}
}  // namespace ptxsim
