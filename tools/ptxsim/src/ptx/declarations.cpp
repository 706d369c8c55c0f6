// Variables, registers and parameters.
#include <cmath>
#include <cstdlib>

#include "ptx/parser.h"

namespace ptxsim {
void Parser::variable_declaration(Space space, bool is_extern, bool at_module_scope) {
  u32 align = 0;
  Type type = kNoType;
  int vec = 1;
  for (;;) {
    skip_space();
    if (text[position] != '.') break;
    std::string d = directive();
    if (d == ".align")
      align = (u32)integer_constant();
    else if (d == ".v2")
      vec = 2;
    else if (d == ".v4")
      vec = 4;
    else if (d == ".attribute") {
      while (text[position] != ')') position++;
      position++;
    } else if (d == ".ptr")
      continue;
    else if ((type = type_from_name(d.substr(1))) != kNoType) {
    } else if (d == ".texref" || d == ".samplerref" || d == ".surfref")
      fail("texture/surface objects are not supported");
    else
      fail("unexpected directive " + d);
  }
  do {
    Variable v;
    v.space = space;
    v.is_extern = is_extern;
    std::string name = identifier();
    u64 count = 1;
    bool arr = false, unsized = false;
    while (accept('[')) {
      arr = true;
      if (accept(']')) {
        unsized = true;
        continue;
      }
      count *= (u64)integer_constant();
      expect(']');
    }
    int element_bytes = type_bytes(type);
    v.align = align ? align : element_bytes * vec;
    if (!v.align) v.align = 1;
    if (accept('=')) {
      initializer(v, type);
      if (unsized && v.init.size()) count = v.init.size() / element_bytes, unsized = false;
    }
    v.size = unsized ? 0 : count * element_bytes * vec;
    v.unsized_extern = unsized;
    (void)arr;
    if (v.init.size() < v.size && !v.init.empty()) v.init.resize(v.size);
    if (at_module_scope) {
      v.name = name;
      if (!module->variables.count(name))
        module->variable_order.push_back(name);
      else if (is_extern)
        continue;  // declaration after definition
      module->variables[name] = v;
    } else {
      v.name = format("%s$%zu", name.c_str(), function->variables.size());
      scopes.back().variables[name] = v.name;
      function->variables.push_back(v);
    }
  } while (accept(','));
  expect(';');
}

void Parser::put_scalar(std::vector<u8>& b, u64 bits, int n) {
  for (int i = 0; i < n; i++) b.push_back((u8)(bits >> (8 * i)));
}

void Parser::initializer_element(Variable& variable, Type type) {
  int element_bytes = type_bytes(type);
  if (peek() == '{') {
    position++;
    if (!accept('}')) {
      do initializer_element(variable, type);
      while (accept(','));
      expect('}');
    }
    return;
  }
  Operand o;
  if (number(o)) {
    if (o.kind == Operand::kDouble && type == kF32) {
      double d;
      memcpy(&d, &o.bits, 8);
      float f = (float)d;
      u32 b;
      memcpy(&b, &f, 4);
      o.bits = b;
    }
    // byte selector form: 0xFF(sym)
    if (o.kind == Operand::kInteger && peek() == '(')
      fail("masked symbol initialisers are not supported");
    put_scalar(variable.init, o.bits, element_bytes);
    return;
  }
  std::string n = identifier();
  bool gen = false;
  if (n == "generic") {
    gen = true;
    expect('(');
    n = identifier();
    expect(')');
  }
  i64 add = 0;
  if (accept('+'))
    add = integer_constant();
  else if (peek() == '-') {
    position++;
    add = -integer_constant();
  }
  variable.relocations.push_back({variable.init.size(), n, add, gen, (u8)element_bytes});
  put_scalar(variable.init, 0, element_bytes);
}

void Parser::initializer(Variable& variable, Type type) { initializer_element(variable, type); }

void Parser::register_declaration() {
  skip_space();
  std::string d = directive();
  if (d == ".v2" || d == ".v4") fail("vector registers are not supported");
  Type type = type_from_name(d.substr(1));
  if (type == kNoType) fail("unknown register type " + d);
  do {
    std::string n = identifier();
    if (accept('<')) {
      int cnt = (int)integer_constant();
      expect('>');
      scopes.back().register_ranges[n] = {(i32)function->registers.size(), cnt};
      for (int i = 0; i < cnt; i++) function->registers.push_back({type, n + std::to_string(i)});
    } else {
      scopes.back().registers[n] = (i32)function->registers.size();
      function->registers.push_back({type, n});
    }
  } while (accept(','));
  expect(';');
}

void Parser::param_list(std::vector<Variable>& out, char close) {
  while (peek() != close) {
    std::string d = directive();
    Space space = kParam;
    bool is_reg = d == ".reg";
    if (d != ".param" && !is_reg) fail("expected .param");
    u32 align = 0;
    Type type = kNoType;
    for (;;) {
      skip_space();
      if (text[position] != '.') break;
      std::string e = directive();
      if (e == ".align")
        align = (u32)integer_constant();
      else if (e == ".ptr") {
        continue;
      } else if (e == ".global" || e == ".shared" || e == ".const" || e == ".local")
        continue;
      else if ((type = type_from_name(e.substr(1))) == kNoType)
        fail("unexpected " + e);
    }
    Variable v;
    v.space = space;
    v.name = identifier();
    u64 cnt = 1;
    while (accept('[')) {
      if (accept(']')) {
        cnt = 0;
        break;
      }
      cnt *= (u64)integer_constant();
      expect(']');
    }
    v.size = cnt * type_bytes(type);
    v.align = align ? align : std::max(1, type_bytes(type));
    if (is_reg) fail(".reg parameters are not supported");
    out.push_back(v);
    if (!accept(',')) break;
  }
  expect(close);
}

void Parser::dims(u32 (&d)[3]) {
  d[0] = (u32)integer_constant();
  d[1] = d[2] = 1;
  if (accept(',')) d[1] = (u32)integer_constant();
  if (accept(',')) d[2] = (u32)integer_constant();
}
}  // namespace ptxsim
