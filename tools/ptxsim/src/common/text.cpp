#include "common/text.h"

#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ptxsim {
std::string format(const char* f, ...) {
  char buffer[2048];
  va_list arguments;
  va_start(arguments, f);
  int length = vsnprintf(buffer, sizeof buffer, f, arguments);
  va_end(arguments);
  if (length < (int)sizeof buffer) return buffer;
  std::string text(length + 1, 0);
  va_start(arguments, f);
  vsnprintf(&text[0], length + 1, f, arguments);
  va_end(arguments);
  text.resize(length);
  return text;
}

std::string demangle(const std::string& name) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 && demangled ? demangled : name;
  free(demangled);
  return result;
}

std::string short_name(const std::string& mangled) {
  std::string name = demangle(mangled);
  return name.size() > 150 ? name.substr(0, 147) + "..." : name;
}
}  // namespace ptxsim
