// Literals and constant expressions.
#include <cstdlib>

#include "ptx/parser.h"

namespace ptxsim {
static bool is_digit(char c) { return isdigit((unsigned char)c); }

static void negate(Operand& literal) {
  if (literal.kind == Operand::kFloat)
    literal.bits ^= 1u << 31;
  else if (literal.kind == Operand::kDouble)
    literal.bits ^= 1ull << 63;
  else
    literal.bits = -literal.bits;
}

bool Parser::number(Operand& literal) {
  skip_space();
  const Mark start = mark();
  const bool negative = current() == '-';
  if (negative || current() == '+') {
    position++;
    skip_space();
  }
  if (!is_digit(current())) {
    back_to(start);
    return false;
  }
  if (!float_bits(literal) && !decimal_float(literal)) integer(literal);
  if (negative) negate(literal);
  return true;
}

// The bits of a float or a double: 0f3f800000, 0d3ff0000000000000.
bool Parser::float_bits(Operand& literal) {
  const char letter = (char)tolower((unsigned char)current(1));
  if (current() != '0' || (letter != 'f' && letter != 'd')) return false;
  const size_t digits = letter == 'f' ? 8 : 16;
  if (position + 2 + digits > text.size()) return false;
  literal.kind = letter == 'f' ? Operand::kFloat : Operand::kDouble;
  literal.bits = strtoull(text.substr(position + 2, digits).c_str(), nullptr, 16);
  position += 2 + digits;
  return true;
}

// Digits with a point or an exponent. In `1.x` the point begins a name.
bool Parser::decimal_float(Operand& literal) {
  size_t digits = 0;
  while (is_digit(current(digits))) digits++;
  const char next = current(digits), after = current(digits + 1);
  const bool point = next == '.' && after && (is_digit(after) || !is_identifier_char(after));
  if (!point && next != 'e' && next != 'E') return false;
  char* end;
  const double value = strtod(text.c_str() + position, &end);
  literal.kind = Operand::kDouble;
  memcpy(&literal.bits, &value, 8);
  position = end - text.c_str();
  return true;
}

// Hexadecimal 0x1f, binary 0b101, octal 017 or decimal, with or without the suffix U.
void Parser::integer(Operand& literal) {
  const char letter = (char)tolower((unsigned char)current(1));
  const bool prefixed = current() == '0' && (letter == 'x' || letter == 'b');
  if (prefixed) position += 2;
  const size_t start = position;
  while (prefixed ? isxdigit((unsigned char)current()) : is_digit(current())) position++;
  const std::string digits = text.substr(start, position - start);
  int base = 10;
  if (prefixed)
    base = letter == 'x' ? 16 : 2;
  else if (digits.size() > 1 && digits[0] == '0')
    base = 8;
  literal.kind = Operand::kInteger;
  literal.bits = strtoull(digits.c_str(), nullptr, base);
  if (current() == 'U') position++;
}

// Integers and their products; sums in parentheses.
i64 Parser::integer_constant() {
  i64 value = integer_factor();
  while (accept('*')) value *= integer_factor();
  return value;
}

i64 Parser::integer_factor() {
  if (!accept('(')) {
    Operand literal;
    if (!number(literal) || literal.kind != Operand::kInteger) fail("expected an integer");
    return (i64)literal.bits;
  }
  i64 value = integer_factor();
  while (!accept(')')) {
    if (accept('+'))
      value += integer_factor();
    else if (accept('-'))
      value -= integer_factor();
    else if (accept('*'))
      value *= integer_factor();
    else
      fail("constant expression");
  }
  return value;
}
}  // namespace ptxsim
