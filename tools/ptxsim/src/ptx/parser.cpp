// Modules, functions and instructions.
#include "ptx/parser.h"

#include <cmath>
#include <cstdlib>

namespace ptxsim {
void Parser::parse_function(bool entry) {
  Function f;
  f.is_entry = entry;
  f.line = line;
  if (!entry && peek() == '(') {
    position++;
    param_list(f.returns, ')');
  }
  f.name = identifier();
  if (accept('(')) param_list(f.params, ')');
  for (;;) {
    skip_space();
    if (text[position] == '{' || text[position] == ';') break;
    std::string d = directive();
    if (d == ".maxntid")
      dims(f.maxntid);
    else if (d == ".reqntid")
      dims(f.reqntid);
    else if (d == ".minnctapersm" || d == ".maxnctapersm" || d == ".maxnreg") {
      int v = (int)integer_constant();
      if (d == ".minnctapersm") f.min_ctas_per_sm = v;
    } else if (d == ".reqnctapercluster")
      dims(f.cluster);
    else if (d == ".explicitcluster")
      f.explicit_cluster = true;
    else if (d == ".maxclusterrank")
      integer_constant();
    else if (d == ".noreturn" || d == ".blocksareclusters" || d == ".uniform") {
    } else if (d == ".abi_preserve" || d == ".abi_preserve_control")
      integer_constant();
    else if (d == ".pragma") {
      while (text[position] != ';') position++;
      position++;
    } else
      fail("unexpected " + d);
  }
  auto it = module->functions.find(f.name);
  if (accept(';')) {
    if (it == module->functions.end()) module->functions[f.name] = f;
    return;
  }
  if (it != module->functions.end() && it->second.has_body)
    fail("function " + f.name + " defined twice");
  f.has_body = true;
  if (entry) module->entry_order.push_back(f.name);
  Function& g = module->functions[f.name] = f;
  function = &g;
  current_file = current_source_line = 0;
  expect('{');
  scopes.clear();
  push_scope(-1);
  body();
  scopes.clear();
  function = nullptr;
}

void Parser::push_scope(int parent) {
  Scope s;
  s.id = (int)function->scope_parent.size();
  function->scope_parent.push_back(parent);
  scopes.push_back(std::move(s));
}

void Parser::body() {
  int depth = 1;
  while (depth > 0) {
    char c = peek();
    if (!c) fail("unexpected end of file in a function body");
    if (c == '{') {
      position++;
      push_scope(scopes.back().id);
      depth++;
      continue;
    }
    if (c == '}') {
      position++;
      scopes.pop_back();
      depth--;
      continue;
    }
    if (c == ';') {
      position++;
      continue;
    }
    if (c == '.') {
      size_t sp = position;
      std::string d = directive();
      if (d == ".reg")
        register_declaration();
      else if (d == ".local")
        variable_declaration(kLocal, false, false);
      else if (d == ".shared") {
        if (text[position] == ':') word();
        variable_declaration(kShared, false, false);
      } else if (d == ".param")
        variable_declaration(kParam, false, false);
      else if (d == ".global")
        variable_declaration(kGlobal, false, false);
      else if (d == ".const")
        variable_declaration(kConst, false, false);
      else if (d == ".extern") {
        std::string e = directive();
        if (e == ".shared")
          variable_declaration(kShared, true, false);
        else
          fail("unexpected .extern " + e);
      } else if (d == ".loc") {
        Operand a, b, c2;
        number(a);
        number(b);
        number(c2);
        current_file = (int)a.bits;
        current_source_line = (int)b.bits;
        skip_line();
      } else if (d == ".pragma") {
        while (text[position] != ';') position++;
        position++;
      } else if (d == ".callprototype" || d == ".calltargets") {
        while (text[position] != ';') position++;
        position++;
      } else if (d == ".section") {
        while (text[position] != '}') {
          if (text[position] == '\n') line++;
          position++;
        }
        position++;
      } else {
        position = sp;
        fail("unexpected directive in a function body");
      }
      continue;
    }
    if (c == '@') {
      position++;
      parse_instruction(true);
      continue;
    }
    // label?
    size_t sp = position;
    int sl = line;
    std::string n = identifier();
    skip_space();
    if (text[position] == ':' && text[position + 1] != ':') {
      position++;
      skip_space();
      if (text.compare(position, 14, ".branchtargets") == 0) {
        position += 14;
        std::vector<std::string> l;
        do l.push_back(identifier());
        while (accept(','));
        expect(';');
        function->branch_targets[{scopes.back().id, n}] = l;
        continue;
      }
      if (text.compare(position, 14, ".callprototype") == 0 ||
          text.compare(position, 12, ".calltargets") == 0) {
        while (text[position] != ';') position++;
        position++;
        continue;
      }
      Statement s;
      s.kind = Statement::kLabel;
      s.label = n;
      s.scope = scopes.back().id;
      s.line = sl;
      function->labels[{s.scope, n}] = (int)function->statements.size();
      function->statements.push_back(std::move(s));
      continue;
    }
    position = sp;
    line = sl;
    parse_instruction(false);
  }
}

void Parser::parse_instruction(bool guarded) {
  Statement s;
  s.scope = scopes.back().id;
  s.file = current_file;
  s.source_line = current_source_line;
  size_t start = position;
  if (guarded) {
    if (accept('!')) s.predicate_negated = true;
    std::string n = identifier();
    s.predicate_register = find_register(n);
    if (s.predicate_register < 0) fail("unknown predicate " + n);
  }
  skip_space();
  s.line = line;
  std::string w = word();
  for (size_t i = 0; i <= w.size();) {
    size_t j = w.find('.', i);
    if (j == std::string::npos) j = w.size();
    s.opcode.push_back(w.substr(i, j - i));
    i = j + 1;
  }
  if (s.opcode[0] == "call") {
    if (accept('(')) {
      if (!accept(')')) {
        do s.call_returns.push_back(operand());
        while (accept(','));
        expect(')');
      }
      expect(',');
    }
    Operand f = operand();
    if (f.kind == Operand::kSymbol) s.callee = f.symbol;
    if (accept(',')) {
      if (accept('(')) {
        if (!accept(')')) {
          do s.call_arguments.push_back(operand());
          while (accept(','));
          expect(')');
        }
      }
      while (accept(',')) operand();
    }
    s.operands.push_back(f);
  } else if (peek() != ';') {
    do s.operands.push_back(operand());
    while (accept(','));
  }
  size_t end = position;
  expect(';');
  s.text = text.substr(start, end - start);
  if (guarded) s.text = "@" + s.text;
  for (auto& ch : s.text)
    if (ch == '\n' || ch == '\t') ch = ' ';
  if (s.text.size() > 160) s.text = s.text.substr(0, 157) + "...";
  function->statements.push_back(std::move(s));
}

void Parser::parse_module() {
  bool is_extern = false;
  while (!at_end()) {
    if (accept(';')) continue;
    std::string d = directive();
    if (d == ".version") {
      Operand o;
      number(o);
      double v;
      memcpy(&v, &o.bits, 8);
      module->version = (int)std::lround((o.kind == Operand::kDouble ? v : (double)o.bits) * 10);
    } else if (d == ".target") {
      module->target = identifier();
      while (accept(',')) identifier();
    } else if (d == ".address_size") {
      if (integer_constant() != 64) fail("only 64-bit PTX is supported");
    } else if (d == ".visible" || d == ".weak" || d == ".common")
      continue;
    else if (d == ".extern") {
      is_extern = true;
      continue;
    } else if (d == ".entry")
      parse_function(true);
    else if (d == ".func")
      parse_function(false);
    else if (d == ".global")
      variable_declaration(kGlobal, is_extern, true);
    else if (d == ".const")
      variable_declaration(kConst, is_extern, true);
    else if (d == ".shared")
      variable_declaration(kShared, is_extern, true);
    else if (d == ".file") {
      i64 n = integer_constant();
      skip_space();
      if (text[position] == '"') {
        size_t e = text.find('"', position + 1);
        module->files[(int)n] = text.substr(position + 1, e - position - 1);
      }
      skip_line();
    } else if (d == ".section") {
      while (position < text.size() && text[position] != '{') position++;
      int dep = 0;
      do {
        if (text[position] == '{') dep++;
        if (text[position] == '}') dep--;
        if (text[position] == '\n') line++;
        position++;
      } while (dep && position < text.size());
    } else if (d == ".pragma" || d == ".alias") {
      while (text[position] != ';') position++;
      position++;
    } else if (d == ".loc")
      skip_line();
    else
      fail("unexpected directive " + d);
    is_extern = false;
  }
}
std::unique_ptr<Module> parse_ptx(const std::string& text, const std::string& source) {
  auto m = std::make_unique<Module>();
  m->source = source;
  Parser ps(text, source, m.get());
  ps.parse_module();
  return m;
}
}  // namespace ptxsim
