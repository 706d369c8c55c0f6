// Bodies of functions: declarations, labels and instructions.
#include "ptx/parser.h"

namespace ptxsim {
// A block within the innermost one, or the outermost of a function.
void Parser::push_scope() {
  const int outer = scopes.empty() ? -1 : scopes.back().id;
  Scope scope;
  scope.id = (int)function->scope_parent.size();
  function->scope_parent.push_back(outer);
  scopes.push_back(std::move(scope));
}

// The body of a function, after its opening brace.
void Parser::body() {
  scopes.clear();
  push_scope();
  while (!scopes.empty()) {
    const char next = peek();
    if (!next) fail("unexpected end of file in a function body");
    if (accept('{'))
      push_scope();
    else if (accept('}'))
      scopes.pop_back();
    else if (accept(';'))
      continue;
    else if (next == '.')
      body_directive();
    else if (accept('@'))
      parse_instruction(true);
    else if (!label())
      parse_instruction(false);
  }
}

void Parser::body_directive() {
  const Mark start = mark();
  const std::string name = directive();
  const Space space = space_of(name);
  if (space != kGeneric) {
    if (space == kShared && current() == ':') word();  // .shared::cta
    variable_declaration(space, false, false);
  } else if (name == ".reg") {
    register_declaration();
  } else if (name == ".extern") {
    const std::string declared = directive();
    if (declared != ".shared") fail("unexpected .extern " + declared);
    variable_declaration(kShared, true, false);
  } else if (name == ".loc") {
    source_location();
  } else if (name == ".pragma" || name == ".callprototype" || name == ".calltargets") {
    skip_past(';');
  } else if (name == ".section") {
    skip_section();
  } else {
    back_to(start);
    fail("unexpected directive in a function body");
  }
}

// .loc file line column: where the instructions that follow stand in the source.
void Parser::source_location() {
  Operand file, source_line;
  number(file);
  number(source_line);
  current_file = (int)file.bits;
  current_source_line = (int)source_line.bits;
  skip_line();
}

// A label, or what is named as labels are. False, and nothing is read, where none stands.
bool Parser::label() {
  const Mark start = mark();
  const std::string name = identifier();
  skip_space();
  if (current() != ':' || current(1) == ':') {
    back_to(start);
    return false;
  }
  position++;
  skip_space();
  if (starts_with(".branchtargets")) {
    branch_targets(name);
  } else if (starts_with(".callprototype") || starts_with(".calltargets")) {
    skip_past(';');
  } else {
    Statement statement;
    statement.kind = Statement::kLabel;
    statement.label = name;
    statement.scope = scopes.back().id;
    statement.line = start.line;
    function->labels[{statement.scope, name}] = (int)function->statements.size();
    function->statements.push_back(std::move(statement));
  }
  return true;
}

// The labels that a brx.idx jumps to.
void Parser::branch_targets(const std::string& name) {
  directive();
  std::vector<std::string> targets;
  do targets.push_back(identifier());
  while (accept(','));
  expect(';');
  function->branch_targets[{scopes.back().id, name}] = std::move(targets);
}

static std::vector<std::string> split_at_dots(const std::string& word) {
  std::vector<std::string> parts;
  for (size_t start = 0; start <= word.size();) {
    const size_t end = std::min(word.find('.', start), word.size());
    parts.push_back(word.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

// The text of an instruction as messages show it: on one line that is not too long.
static std::string shown(std::string text) {
  constexpr size_t kMost = 160;
  for (char& c : text)
    if (c == '\n' || c == '\t') c = ' ';
  return text.size() > kMost ? text.substr(0, kMost - 3) + "..." : text;
}

// An instruction; guarded: after the @.
void Parser::parse_instruction(bool guarded) {
  Statement statement;
  statement.scope = scopes.back().id;
  statement.file = current_file;
  statement.source_line = current_source_line;
  const size_t start = position;
  if (guarded) guard(statement);
  skip_space();
  statement.line = line;
  statement.opcode = split_at_dots(word());
  if (statement.name() == "call") {
    call_operands(statement);
  } else if (peek() != ';') {
    do statement.operands.push_back(operand());
    while (accept(','));
  }
  const size_t end = position;
  expect(';');
  statement.text = shown((guarded ? "@" : "") + text.substr(start, end - start));
  function->statements.push_back(std::move(statement));
}

// The predicate of an instruction: p or !p.
void Parser::guard(Statement& statement) {
  statement.predicate_negated = accept('!');
  const std::string name = identifier();
  statement.predicate_register = find_register(name);
  if (statement.predicate_register < 0) fail("unknown predicate " + name);
}

// (results), function, (arguments), prototype
void Parser::call_operands(Statement& statement) {
  if (accept('(')) {
    operand_list(statement.call_returns, ')');
    expect(',');
  }
  const Operand callee = operand();
  if (callee.kind == Operand::kSymbol) statement.callee = callee.symbol;
  if (accept(',')) {
    if (accept('(')) operand_list(statement.call_arguments, ')');
    while (accept(',')) operand();
  }
  statement.operands.push_back(callee);
}
}  // namespace ptxsim
