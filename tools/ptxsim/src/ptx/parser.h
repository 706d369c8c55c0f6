// The parser of PTX: a recursive descent over the text.
#pragma once
#include "ptx/syntax.h"

namespace ptxsim {
struct Parser {
  const std::string& text;
  std::string source;
  size_t position = 0;
  int line = 1;
  Module* module;
  Function* function = nullptr;
  struct Scope {
    int id;
    std::unordered_map<std::string, i32> registers;
    std::unordered_map<std::string, std::pair<i32, i32>>
        register_ranges;                                     // prefix -> (first id, count)
    std::unordered_map<std::string, std::string> variables;  // name -> unique name
  };
  std::vector<Scope> scopes;
  int current_file = 0, current_source_line = 0;

  Parser(const std::string& text, const std::string& source, Module* module)
      : text(text), source(source), module(module) {}

  [[noreturn]] void fail(const std::string& m);
  void skip_space();
  bool at_end();
  char peek();
  bool accept(char c);
  void expect(char c);
  static bool is_identifier_char(char c);
  std::string identifier();
  // dotted word such as ".reg" or "ld.global.v2.f32" (with "::" parts)
  std::string word();
  std::string peek_word();
  std::string directive();
  void skip_line();

  // numbers: returns IMM / FIMM / DIMM operand
  bool number(Operand& o);
  i64 integer_constant();

  // ---- symbols
  i32 find_register(const std::string& n);
  std::string find_variable(const std::string& n);

  // ---- operands
  Operand operand();

  // ---- variable declarations: after the state-space directive has been read
  void variable_declaration(Space space, bool is_extern, bool at_module_scope);
  void put_scalar(std::vector<u8>& b, u64 bits, int n);
  void initializer_element(Variable& variable, Type type);
  void initializer(Variable& variable, Type type);

  void register_declaration();

  void param_list(std::vector<Variable>& out, char close);

  void dims(u32 (&d)[3]);

  void parse_function(bool entry);
  void push_scope(int parent);

  void body();

  void parse_instruction(bool guarded);

  void parse_module();
};
}  // namespace ptxsim
