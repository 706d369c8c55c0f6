// Initial values of variables.
#include "ptx/parser.h"

namespace ptxsim {
static void append(std::vector<u8>& bytes, u64 value, int size) {
  for (int i = 0; i < size; i++) bytes.push_back((u8)(value >> (8 * i)));
}

static u64 bits_of_float(u64 bits_of_double) {
  double wide;
  memcpy(&wide, &bits_of_double, 8);
  const float narrow = (float)wide;
  u32 bits;
  memcpy(&bits, &narrow, 4);
  return bits;
}

// A number, the address of a variable, or a list of them in braces.
void Parser::initializer(Variable& variable, Type type) {
  if (accept('{')) {
    if (accept('}')) return;
    do initializer(variable, type);
    while (accept(','));
    expect('}');
    return;
  }
  Operand literal;
  if (!number(literal)) {
    initial_address(variable, type_bytes(type));
    return;
  }
  if (literal.kind == Operand::kDouble && type == kF32) literal.bits = bits_of_float(literal.bits);
  if (literal.kind == Operand::kInteger && peek() == '(')  // 0xFF(symbol): one byte of an address
    fail("masked symbol initializers are not supported");
  append(variable.init, literal.bits, type_bytes(type));
}

// symbol, generic(symbol), symbol + 4. The loader writes the address; all addresses are generic.
void Parser::initial_address(Variable& variable, int bytes) {
  std::string symbol = identifier();
  if (symbol == "generic") {
    expect('(');
    symbol = identifier();
    expect(')');
  }
  i64 addend = 0;
  if (accept('+'))
    addend = integer_constant();
  else if (accept('-'))
    addend = -integer_constant();
  variable.relocations.push_back({variable.init.size(), symbol, addend, (u8)bytes});
  append(variable.init, 0, bytes);
}
}  // namespace ptxsim
