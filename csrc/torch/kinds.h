// The kinds of activation, by the names that the ops take. Binding ring.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "check.h"
#include "sqk/quantize.h"

namespace sqk {

struct Kind {
  const char* name;
  Producer producer;
  bool fused;  // x is [..., 2K]: gate, then up
};
inline constexpr Kind kKinds[] = {
    {"relu", Producer::kRelu, false},
    {"gelu", Producer::kGelu, false},
    {"gelu_tanh", Producer::kGeluTanh, false},
    {"silu", Producer::kSilu, false},
    {"silu_mul", Producer::kSilu, true},
    {"gelu_mul", Producer::kGelu, true},
    {"gelu_tanh_mul", Producer::kGeluTanh, true},
};

inline const Kind& find_kind(const char* op, std::string_view name, bool only_fused) {
  std::string known;
  for (const Kind& kind : kKinds) {
    if (only_fused && !kind.fused) continue;
    if (name == kind.name) return kind;
    known += (known.empty() ? "" : ", ") + std::string(kind.name);
  }
  throw std::runtime_error(concat(op, ": kind must be one of ", known, "; got '", name, "'."));
}

}  // namespace sqk
