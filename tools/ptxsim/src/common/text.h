// Texts of messages.
#pragma once
#include <string>

namespace ptxsim {
std::string format(const char* f, ...) __attribute__((format(printf, 1, 2)));
std::string demangle(const std::string& name);
std::string short_name(const std::string& mangled);  // demangled, cut to a readable length
}  // namespace ptxsim
