// Integers, state spaces and types of PTX.
#pragma once
#include <cstdint>
#include <string>

namespace ptxsim {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

enum Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

enum Type : u8 {
  kNoType,
  kPredicate,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBf16,
  kF16x2,
  kBf16x2,
  kF32,
  kF64,
  kF32x2,
  kU16x2,
  kS16x2,
  kTf32,
  kE4m3,
  kE5m2,
  kE4m3x2,
  kE5m2x2,
  kS4,
  kU4,
  kB1,
  kOtherType
};
int type_bytes(Type type);
const char* type_name(Type type);
Type type_from_name(const std::string& name);  // kNoType when it is not a type

inline bool type_is_signed(Type type) {
  return type == kS8 || type == kS16 || type == kS32 || type == kS64;
}
inline bool type_is_float(Type type) {
  return type == kF16 || type == kBf16 || type == kF32 || type == kF64;
}
}  // namespace ptxsim
