// The parser of PTX: a recursive descent over the text.
#pragma once
#include <string_view>

#include "ptx/syntax.h"

namespace ptxsim {
struct Parser {
  // A block in braces. Names of its own hide those of the blocks around it.
  struct Scope {
    int id;
    std::unordered_map<std::string, i32> registers;
    struct Range {
      i32 first, count;
    };
    std::unordered_map<std::string, Range> register_ranges;  // .reg .b32 %r<9>: by the prefix %r
    std::unordered_map<std::string, std::string> variables;  // name -> unique name
  };
  // A place in the text to come back to.
  struct Mark {
    size_t position;
    int line;
  };
  // What the names of one declaration share.
  struct VariableType {
    Type type = kNoType;
    u32 align = 0;  // 0: that of the type
    int vector = 1;
  };

  const std::string& text;
  std::string source;
  size_t position = 0;
  int line = 1;
  Module* module;
  Function* function = nullptr;
  std::vector<Scope> scopes;  // the innermost last
  int current_file = 0, current_source_line = 0;

  Parser(const std::string& text, const std::string& source, Module* module)
      : text(text), source(source), module(module) {}
  [[noreturn]] void fail(const std::string& message);

  // Characters and names (lexer.cpp)
  static bool is_identifier_char(char c);
  Mark mark() const { return {position, line}; }
  void back_to(const Mark& mark);
  char current(size_t ahead = 0) const {  // 0 past the end
    return position + ahead < text.size() ? text[position + ahead] : 0;
  }
  bool starts_with(std::string_view word) const {
    return current() == word[0] && text.compare(position, word.size(), word) == 0;
  }
  void skip_space();
  void skip_line();
  void skip_past(char end);
  bool at_end();
  char peek();
  bool accept(char expected);
  void expect(char expected);
  std::string identifier();
  std::string word();       // dotted, such as ld.global.v2.f32, with :: in it
  std::string directive();  // one component with its dot, such as .align

  // Numbers (numbers.cpp)
  bool number(Operand& literal);  // false, and nothing is read, where none stands
  bool float_bits(Operand& literal);
  bool decimal_float(Operand& literal);
  void integer(Operand& literal);
  i64 integer_constant();
  i64 integer_factor();

  // Operands (operands.cpp)
  i32 find_register(const std::string& name);  // -1: there is none
  std::string find_variable(const std::string& name);
  Operand operand();
  void operand_list(std::vector<Operand>& list, char close);
  Operand memory_operand();
  Operand number_operand();
  Operand named_operand();
  Operand register_operand(i32 id);
  Operand special_register(std::string name);
  Operand symbol_operand(const std::string& name);

  // Declarations, after the directive of the state space (declarations.cpp)
  void variable_declaration(Space space, bool is_extern, bool at_module_scope);
  VariableType variable_type();
  u64 array_length(bool& unsized);
  Variable variable(const VariableType& declared);
  void declare_in_module(const std::string& name, const Variable& variable);
  void declare_in_function(const std::string& name, Variable variable);
  void register_declaration();
  void parameter_list(std::vector<Variable>& parameters, char close);
  Variable parameter();
  VariableType parameter_type();

  // Initial values (initializers.cpp)
  void initializer(Variable& variable, Type type);
  void initial_address(Variable& variable, int bytes);

  // Bodies of functions and their instructions (statements.cpp)
  void push_scope();
  void body();
  void body_directive();
  void source_location();
  bool label();
  void branch_targets(const std::string& name);
  void parse_instruction(bool guarded);
  void guard(Statement& statement);
  void call_operands(Statement& statement);

  // Modules and functions (parser.cpp)
  void parse_module();
  bool module_directive(const std::string& name);
  bool module_variable(const std::string& name, bool is_extern);
  void version();
  void target();
  void source_file();
  void skip_section();
  void parse_function(bool entry);
  Function function_header(bool entry);
  void function_attributes(Function& header);
  bool launch_size(const std::string& name, Function& header);
  void dimensions(u32 (&sizes)[3]);
};

// The state space that a directive such as .shared names; kGeneric when it names none.
Space space_of(const std::string& directive);
}  // namespace ptxsim
