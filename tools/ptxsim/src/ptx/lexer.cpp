// Characters, names and numbers.
#include <cmath>
#include <cstdlib>

#include "ptx/parser.h"

namespace ptxsim {
void Parser::fail(const std::string& m) {
  size_t e = text.find('\n', position);
  std::string near =
      text.substr(position, e == std::string::npos ? 60 : std::min<size_t>(e - position, 120));
  throw SimError(kErrorLoad, format("PTX parse error in %s line %d: %s (near '%s')", source.c_str(),
                                    line, m.c_str(), near.c_str()));
}

void Parser::skip_space() {
  for (;;) {
    while (position < text.size() && (text[position] == ' ' || text[position] == '\t' ||
                                      text[position] == '\r' || text[position] == '\n')) {
      if (text[position] == '\n') line++;
      position++;
    }
    if (position + 1 < text.size() && text[position] == '/' && text[position + 1] == '/') {
      while (position < text.size() && text[position] != '\n') position++;
      continue;
    }
    if (position + 1 < text.size() && text[position] == '/' && text[position + 1] == '*') {
      while (position + 1 < text.size() && !(text[position] == '*' && text[position + 1] == '/')) {
        if (text[position] == '\n') line++;
        position++;
      }
      position += 2;
      continue;
    }
    if (position < text.size() && text[position] == '\0') {
      position++;
      continue;
    }
    if (position < text.size() && text[position] == '#') {
      while (position < text.size() && text[position] != '\n') position++;
      continue;
    }
    break;
  }
}

bool Parser::at_end() {
  skip_space();
  return position >= text.size();
}

char Parser::peek() {
  skip_space();
  return position < text.size() ? text[position] : 0;
}

bool Parser::accept(char c) {
  if (peek() == c) {
    position++;
    return true;
  }
  return false;
}

void Parser::expect(char c) {
  if (!accept(c)) fail(format("expected '%c'", c));
}

bool Parser::is_identifier_char(char c) {
  return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%';
}

std::string Parser::identifier() {
  skip_space();
  size_t s = position;
  while (position < text.size() && is_identifier_char(text[position])) position++;
  if (s == position) fail("expected a name");
  return text.substr(s, position - s);
}

std::string Parser::word() {
  skip_space();
  size_t s = position;
  while (position < text.size() &&
         (is_identifier_char(text[position]) || text[position] == '.' ||
          (text[position] == ':' && position + 1 < text.size() && text[position + 1] == ':') ||
          (text[position] == ':' && position > s && text[position - 1] == ':')))
    position++;
  if (s == position) fail("expected a word");
  return text.substr(s, position - s);
}

std::string Parser::peek_word() {
  size_t sp = position;
  int sl = line;
  skip_space();
  if (position >= text.size() || !(is_identifier_char(text[position]) || text[position] == '.')) {
    position = sp;
    line = sl;
    return "";
  }
  std::string w = word();
  position = sp;
  line = sl;
  return w;
}

std::string Parser::directive() {  // ".align" etc, one dotted component
  skip_space();
  if (text[position] != '.') fail("expected a directive");
  size_t s = position++;
  while (position < text.size() && is_identifier_char(text[position])) position++;
  return text.substr(s, position - s);
}

void Parser::skip_line() {
  while (position < text.size() && text[position] != '\n') position++;
}

bool Parser::number(Operand& o) {
  skip_space();
  size_t s = position;
  bool neg = false;
  if (text[position] == '-') {
    neg = true;
    position++;
    skip_space();
  } else if (text[position] == '+') {
    position++;
    skip_space();
  }
  if (position >= text.size() || !isdigit((unsigned char)text[position])) {
    position = s;
    return false;
  }
  if (text[position] == '0' && position + 1 < text.size() &&
      (text[position + 1] == 'f' || text[position + 1] == 'F') && position + 10 <= text.size()) {
    o.kind = Operand::kFloat;
    o.bits = strtoull(text.substr(position + 2, 8).c_str(), nullptr, 16);
    if (neg) o.bits ^= 0x80000000u;
    position += 10;
    return true;
  }
  if (text[position] == '0' && position + 1 < text.size() &&
      (text[position + 1] == 'd' || text[position + 1] == 'D') && position + 18 <= text.size()) {
    o.kind = Operand::kDouble;
    o.bits = strtoull(text.substr(position + 2, 16).c_str(), nullptr, 16);
    if (neg) o.bits ^= 1ull << 63;
    position += 18;
    return true;
  }
  size_t e = position;
  bool hex = text[position] == '0' && (text[position + 1] == 'x' || text[position + 1] == 'X');
  bool bin = text[position] == '0' && (text[position + 1] == 'b' || text[position + 1] == 'B');
  if (hex || bin) {
    e = position + 2;
    while (e < text.size() && isxdigit((unsigned char)text[e])) e++;
    o.bits = strtoull(text.substr(position + 2, e - position - 2).c_str(), nullptr, hex ? 16 : 2);
  } else {
    while (e < text.size() && isdigit((unsigned char)text[e])) e++;
    bool flt = false;
    if (e < text.size() && text[e] == '.' && e + 1 < text.size() &&
        (isdigit((unsigned char)text[e + 1]) || !is_identifier_char(text[e + 1])))
      flt = true;
    if (e < text.size() && (text[e] == 'e' || text[e] == 'E')) flt = true;
    if (flt) {
      char* end;
      double d = strtod(text.c_str() + position, &end);
      if (neg) d = -d;
      o.kind = Operand::kDouble;
      memcpy(&o.bits, &d, 8);
      position = end - text.c_str();
      return true;
    }
    std::string ds = text.substr(position, e - position);
    o.bits = strtoull(ds.c_str(), nullptr, ds.size() > 1 && ds[0] == '0' ? 8 : 10);
  }
  position = e;
  if (position < text.size() && text[position] == 'U') position++;
  o.kind = Operand::kInteger;
  if (neg) o.bits = (u64)(-(i64)o.bits);
  return true;
}

i64 Parser::integer_constant() {  // sums/products of integers, parenthesised
  auto prim = [&](auto& self) -> i64 {
    if (accept('(')) {
      i64 v = self(self);
      while (!accept(')')) {
        if (accept('+'))
          v += self(self);
        else if (accept('-'))
          v -= self(self);
        else if (accept('*'))
          v *= self(self);
        else
          fail("constant expression");
      }
      return v;
    }
    Operand o;
    if (!number(o) || o.kind != Operand::kInteger) fail("expected an integer");
    return (i64)o.bits;
  };
  i64 v = prim(prim);
  for (;;) {
    if (peek() == '*') {
      position++;
      v *= prim(prim);
    } else
      break;
  }
  return v;
}
}  // namespace ptxsim
