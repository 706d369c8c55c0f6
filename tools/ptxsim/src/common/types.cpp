#include "common/types.h"

#include <unordered_map>

namespace ptxsim {
static const struct {
  const char* name;
  Type type;
  u8 bytes;
} kTypes[] = {
    {"pred", kPredicate, 4}, {"b8", kB8, 1},         {"b16", kB16, 2},       {"b32", kB32, 4},
    {"b64", kB64, 8},        {"b128", kB128, 16},    {"u8", kU8, 1},         {"u16", kU16, 2},
    {"u32", kU32, 4},        {"u64", kU64, 8},       {"s8", kS8, 1},         {"s16", kS16, 2},
    {"s32", kS32, 4},        {"s64", kS64, 8},       {"f16", kF16, 2},       {"bf16", kBf16, 2},
    {"f16x2", kF16x2, 4},    {"bf16x2", kBf16x2, 4}, {"f32", kF32, 4},       {"f64", kF64, 8},
    {"f32x2", kF32x2, 8},    {"u16x2", kU16x2, 4},   {"s16x2", kS16x2, 4},   {"tf32", kTf32, 4},
    {"e4m3", kE4m3, 1},      {"e5m2", kE5m2, 1},     {"e4m3x2", kE4m3x2, 2}, {"e5m2x2", kE5m2x2, 2},
    {"s4", kS4, 1},          {"u4", kU4, 1},         {"b1", kB1, 1}};

int type_bytes(Type type) {
  for (auto& row : kTypes)
    if (row.type == type) return row.bytes;
  return 0;
}
const char* type_name(Type type) {
  for (auto& row : kTypes)
    if (row.type == type) return row.name;
  return "?";
}
Type type_from_name(const std::string& name) {
  static const auto* types = [] {
    auto* map = new std::unordered_map<std::string, Type>;
    for (auto& row : kTypes) (*map)[row.name] = row.type;
    return map;
  }();
  auto found = types->find(name);
  return found == types->end() ? kNoType : found->second;
}
}  // namespace ptxsim
