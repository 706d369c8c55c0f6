// Characters and names.
#include <algorithm>

#include "ptx/parser.h"

namespace ptxsim {
void Parser::fail(const std::string& message) {
  size_t end = text.find('\n', position);
  size_t shown = end == std::string::npos ? 60 : std::min<size_t>(end - position, 120);
  throw SimError(kErrorLoad, format("PTX parse error in %s line %d: %s (near '%s')", source.c_str(),
                                    line, message.c_str(), text.substr(position, shown).c_str()));
}

void Parser::back_to(const Mark& mark) {
  position = mark.position;
  line = mark.line;
}

// Skips blanks, comments and lines of the preprocessor.
void Parser::skip_space() {
  while (position < text.size()) {
    char next = text[position];
    if (next == '\n') {
      line++;
      position++;
    } else if (next == ' ' || next == '\t' || next == '\r' || next == '\0') {
      position++;
    } else if (next == '#' || starts_with("//")) {
      skip_line();
    } else if (starts_with("/*")) {
      size_t end = std::min(text.find("*/", position), text.size());
      line += (int)std::count(text.begin() + position, text.begin() + end, '\n');
      position = std::min(end + 2, text.size());
    } else {
      break;
    }
  }
}

// Skips to the end of the line.
void Parser::skip_line() { position = std::min(text.find('\n', position), text.size()); }

// Skips whatever stands before a character, and the character.
void Parser::skip_past(char end) {
  while (position < text.size() && text[position] != end) {
    if (text[position] == '\n') line++;
    position++;
  }
  if (position == text.size()) fail(format("expected '%c'", end));
  position++;
}

bool Parser::at_end() {
  skip_space();
  return position >= text.size();
}

char Parser::peek() {
  skip_space();
  return current();
}

bool Parser::accept(char expected) {
  if (peek() != expected) return false;
  position++;
  return true;
}

void Parser::expect(char expected) {
  if (!accept(expected)) fail(format("expected '%c'", expected));
}

bool Parser::is_identifier_char(char c) {
  return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%';
}

std::string Parser::identifier() {
  skip_space();
  size_t start = position;
  while (is_identifier_char(current())) position++;
  if (start == position) fail("expected a name");
  return text.substr(start, position - start);
}

std::string Parser::word() {
  skip_space();
  size_t start = position;
  for (;;) {
    if (is_identifier_char(current()) || current() == '.')
      position++;
    else if (starts_with("::"))
      position += 2;
    else
      break;
  }
  if (start == position) fail("expected a word");
  return text.substr(start, position - start);
}

std::string Parser::directive() {
  skip_space();
  if (current() != '.') fail("expected a directive");
  size_t start = position++;
  while (is_identifier_char(current())) position++;
  return text.substr(start, position - start);
}
}  // namespace ptxsim
