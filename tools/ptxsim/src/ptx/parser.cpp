// Modules and functions.
#include "ptx/parser.h"

#include <cmath>
#include <set>

namespace ptxsim {
void Parser::parse_module() {
  bool is_extern = false;  // the declaration that follows is .extern
  while (!at_end()) {
    if (accept(';')) continue;
    const std::string name = directive();
    if (name == ".visible" || name == ".weak" || name == ".common") continue;
    if (name == ".extern") {
      is_extern = true;
      continue;
    }
    if (name == ".entry" || name == ".func")
      parse_function(name == ".entry");
    else if (!module_variable(name, is_extern) && !module_directive(name))
      fail("unexpected directive " + name);
    is_extern = false;
  }
}

bool Parser::module_variable(const std::string& name, bool is_extern) {
  const Space space = space_of(name);
  if (space != kGlobal && space != kConst && space != kShared) return false;
  variable_declaration(space, is_extern, true);
  return true;
}

// A directive that declares nothing. Returns false when it is not known.
bool Parser::module_directive(const std::string& name) {
  if (name == ".version") {
    version();
  } else if (name == ".target") {
    target();
  } else if (name == ".address_size") {
    if (integer_constant() != 64) fail("only 64-bit PTX is supported");
  } else if (name == ".file") {
    source_file();
  } else if (name == ".section") {
    skip_section();
  } else if (name == ".pragma" || name == ".alias") {
    skip_past(';');
  } else if (name == ".loc") {
    skip_line();
  } else {
    return false;
  }
  return true;
}

// 8.2 is kept as 82.
void Parser::version() {
  Operand literal;
  number(literal);
  double value = (double)literal.bits;
  if (literal.kind == Operand::kDouble) memcpy(&value, &literal.bits, 8);
  module->version = (int)std::lround(value * 10);
}

// The architecture; the options that follow it do not matter.
void Parser::target() {
  module->target = identifier();
  while (accept(',')) identifier();
}

// The number and the name of a source file, to which .loc refers.
void Parser::source_file() {
  const int number = (int)integer_constant();
  if (peek() == '"') {
    const size_t start = position + 1;
    module->files[number] = text.substr(start, text.find('"', start) - start);
  }
  skip_line();
}

// Debugging information: braces, and whatever stands in them.
void Parser::skip_section() {
  int depth = 0;
  while (position < text.size()) {
    const char c = text[position++];
    if (c == '\n') line++;
    if (c == '{') depth++;
    if (c == '}' && --depth <= 0) return;
  }
}

void Parser::parse_function(bool entry) {
  Function header = function_header(entry);
  auto known = module->functions.find(header.name);
  if (accept(';')) {  // a declaration
    if (known == module->functions.end()) module->functions[header.name] = header;
    return;
  }
  if (known != module->functions.end() && known->second.has_body)
    fail("function " + header.name + " defined twice");
  header.has_body = true;
  if (entry) module->entry_order.push_back(header.name);
  function = &(module->functions[header.name] = header);
  current_file = current_source_line = 0;
  expect('{');
  body();
  function = nullptr;
}

// All of a function that stands before its body or the semicolon of a declaration.
Function Parser::function_header(bool entry) {
  Function header;
  header.is_entry = entry;
  header.line = line;
  if (!entry && accept('(')) parameter_list(header.returns, ')');
  header.name = identifier();
  if (accept('(')) parameter_list(header.params, ')');
  function_attributes(header);
  return header;
}

void Parser::function_attributes(Function& header) {
  static const std::set<std::string> kWithNumber = {".minnctapersm", ".maxnctapersm",
                                                    ".maxnreg",      ".maxclusterrank",
                                                    ".abi_preserve", ".abi_preserve_control"};
  static const std::set<std::string> kAlone = {".explicitcluster", ".blocksareclusters",
                                               ".noreturn", ".uniform"};
  while (peek() != '{' && peek() != ';') {
    const std::string name = directive();
    if (launch_size(name, header)) continue;
    if (kWithNumber.count(name))
      integer_constant();
    else if (name == ".pragma")
      skip_past(';');
    else if (!kAlone.count(name))
      fail("unexpected " + name);
  }
}

// The attributes that give the sizes of blocks and clusters. Returns false for any other.
bool Parser::launch_size(const std::string& name, Function& header) {
  if (name == ".maxntid")
    dimensions(header.maxntid);
  else if (name == ".reqntid")
    dimensions(header.reqntid);
  else if (name == ".reqnctapercluster")
    dimensions(header.cluster);
  else
    return false;
  return true;
}

// One to three sizes; those that are missing are 1.
void Parser::dimensions(u32 (&sizes)[3]) {
  sizes[0] = (u32)integer_constant();
  sizes[1] = accept(',') ? (u32)integer_constant() : 1;
  sizes[2] = accept(',') ? (u32)integer_constant() : 1;
}

std::unique_ptr<Module> parse_ptx(const std::string& text, const std::string& source) {
  auto module = std::make_unique<Module>();
  module->source = source;
  Parser(text, source, module.get()).parse_module();
  return module;
}
}  // namespace ptxsim
