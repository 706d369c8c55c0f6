// Conversions between scalar types: cvt.
#include "instructions/convert.h"

#include <cmath>

#include "instructions/float.h"

namespace ptxsim {
// The common conversions.
static void execute_cvt_f32_s32(Warp& warp, const Instruction& instruction, u32 lanes) {
  float* destination = warp.destination<float>(instruction.operands[0]);
  const i32* a = warp.source<i32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (float)a[lane]; });
}
static void execute_cvt_f32_u32(Warp& warp, const Instruction& instruction, u32 lanes) {
  float* destination = warp.destination<float>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (float)a[lane]; });
}
static void execute_cvt_f16_f32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const float* a = warp.source<float>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = float_to_half_bits(a[lane]); });
}
static void execute_cvt_f32_f16(Warp& warp, const Instruction& instruction, u32 lanes) {
  float* destination = warp.destination<float>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = canonical_nan(half_bits_to_float((u16)a[lane]));
  });
}
static void execute_cvt_bf16_f32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const float* a = warp.source<float>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = float_to_bf16(a[lane]); });
}
static void execute_cvt_f32_bf16(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = a[lane] << 16; });
}
static void execute_cvt_u32_u64(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u64* a = warp.source<u64>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)a[lane]; });
}
static void execute_cvt_u64_u32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* destination = warp.destination<u64>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = a[lane]; });
}
static void execute_cvt_s64_s32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* destination = warp.destination<u64>(instruction.operands[0]);
  const i32* a = warp.source<i32>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (u64)(i64)a[lane]; });
}

// The general conversions: type is the destination's, type2 the source's, imm the rounding, imm2
// satfinite.
static double round_to_integer(double x, u8 rounding) {
  switch (rounding) {
    case kRoundZeroInt:
      return std::trunc(x);
    case kRoundDownInt:
      return std::floor(x);
    case kRoundUpInt:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}
// Extended to 64 bits.
static u64 read_integer(Type type, const void* slot, int lane) {
  switch (type) {
    case kS8:
      return (u64)(i64)read_lane<i8>(slot, lane);
    case kS16:
      return (u64)(i64)read_lane<i16>(slot, lane);
    case kS32:
      return (u64)(i64)read_lane<i32>(slot, lane);
    case kU8:
    case kB8:
      return read_lane<u8>(slot, lane);
    case kU16:
    case kB16:
      return read_lane<u16>(slot, lane);
    case kU32:
    case kB32:
      return read_lane<u32>(slot, lane);
    default:
      return read_lane<u64>(slot, lane);
  }
}
static double read_float(const Instruction& instruction, const void* slot, int lane) {
  switch ((Type)instruction.type2) {
    case kF16:
      return half_bits_to_float(read_lane<u16>(slot, lane));
    case kBf16:
      return bf16_to_float(read_lane<u16>(slot, lane));
    case kF32: {
      float value = read_lane<float>(slot, lane);
      return (instruction.modifiers & kModifierFtz) ? flush_subnormal(value) : value;
    }
    case kF64:
      return read_lane<double>(slot, lane);
    default:
      return 0;  // PTX has no conversion from tf32
  }
}
// Registers wider than the type hold the extended value.
static void write_integer(Type type, void* slot, int lane, u64 value) {
  switch (type) {
    case kS8:
      ((u32*)slot)[lane] = (u32)(i32)(i8)value;
      break;
    case kU8:
    case kB8:
      ((u32*)slot)[lane] = (u8)value;
      break;
    case kS16:
      ((u32*)slot)[lane] = (u32)(i32)(i16)value;
      break;
    case kU16:
    case kB16:
      ((u32*)slot)[lane] = (u16)value;
      break;
    case kU64:
    case kB64:
    case kS64:
      ((u64*)slot)[lane] = value;
      break;
    default:
      ((u32*)slot)[lane] = (u32)value;
      break;
  }
}
static SmallFloat half_format(Type type) { return type == kF16 ? kSmallF16 : kSmallBf16; }

static void execute_cvt_integer_to_float(Warp& warp, const Instruction& instruction, u32 lanes) {
  Type to = (Type)instruction.type, from = (Type)instruction.type2;
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  Rounding rounding = (Rounding)instruction.imm;
  RoundGuard guard(type_is_float(to) ? rounding : kRoundNone);
  for_each_lane(lanes, [&](int lane) {
    u64 value = read_integer(from, a, lane);
    bool is_signed = type_is_signed(from);
    if (to == kF32) {
      volatile float rounded = is_signed ? (float)(i64)value : (float)value;
      bool saturates = instruction.modifiers & kModifierSat;
      write_lane<float>(destination, lane, saturates ? saturate(rounded) : rounded);
    } else if (to == kF64) {
      volatile double rounded = is_signed ? (double)(i64)value : (double)value;
      write_lane<double>(destination, lane, rounded);
    } else {
      // exact below 2^53, beyond which f16 overflows anyway
      double exact = is_signed ? (double)(i64)value : (double)value;
      write_lane<u16>(
          destination, lane,
          (u16)to_small(exact, half_format(to), rounding == kRoundNone ? kRoundNearest : rounding));
    }
  });
}

static float f32_of(const Instruction& instruction, double x) {
  volatile float rounded = (float)x;
  float value = canonical_nan((float)rounded);
  if (instruction.modifiers & kModifierFtz) value = flush_subnormal(value);
  if (instruction.modifiers & kModifierSat) value = saturate(value);
  if ((instruction.modifiers & kModifierRelu) && value < 0) value = 0;
  return value;
}
static double f64_of(const Instruction& instruction, double x) {
  if (!(instruction.modifiers & kModifierSat)) return canonical_nan(x);
  return x != x || x < 0 ? 0 : x > 1 ? 1 : x;
}
static u32 tf32_of(const Instruction& instruction, double x) {
  if (x != x) return 0x7fffffffu;
  Rounding rounding = (Rounding)instruction.imm;
  u32 bits = to_small(x, kSmallTf32, rounding == kRoundNone ? kRoundNearestAway : rounding,
                      instruction.imm2);
  if ((instruction.modifiers & kModifierRelu) && (bits >> 18)) bits = 0;
  return bits << 13;
}
static u16 half_of(const Instruction& instruction, double x) {
  SmallFloat format = half_format((Type)instruction.type);
  Rounding rounding = (Rounding)instruction.imm;
  bool nan = x != x;
  u32 bits;
  if (instruction.modifiers & kModifierSat)
    bits = nan ? 0 : to_small(x < 0 ? 0 : x > 1 ? 1 : x, format, rounding);
  else
    bits =
        to_small(x, format,
                 rounding == kRoundNone || rounding >= kRoundNearestInt ? kRoundNearest : rounding,
                 instruction.imm2);
  if ((instruction.modifiers & kModifierRelu) && (bits & 0x8000) && !nan) bits = 0;
  return (u16)bits;
}
static void execute_cvt_float_to_float(Warp& warp, const Instruction& instruction, u32 lanes) {
  Type to = (Type)instruction.type;
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  u8 rounding = (u8)instruction.imm;
  RoundGuard guard(type_is_float(to) ? rounding : kRoundNone);
  for_each_lane(lanes, [&](int lane) {
    double x = read_float(instruction, a, lane);
    if (rounding >= kRoundNearestInt) {
      double integer = round_to_integer(x, rounding);
      x = integer == 0 ? std::copysign(0.0, x) : integer;
    }
    if (to == kF32)
      write_lane<float>(destination, lane, f32_of(instruction, x));
    else if (to == kF64)
      write_lane<double>(destination, lane, f64_of(instruction, x));
    else if (to == kTf32)
      write_lane<u32>(destination, lane, tf32_of(instruction, x));
    else
      write_lane<u16>(destination, lane, half_of(instruction, x));
  });
}

// Out of range: the nearest integer of the type.
static u64 integer_of(double x, bool is_signed, int bits) {
  u64 lowest_signed = 1ull << (bits - 1);
  double end = std::ldexp(1.0, is_signed ? bits - 1 : bits);
  if (is_signed) return x < -end ? lowest_signed : x >= end ? lowest_signed - 1 : (u64)(i64)x;
  return x <= 0 ? 0 : x >= end ? ~0ull >> (64 - bits) : (u64)x;
}
static void execute_cvt_float_to_integer(Warp& warp, const Instruction& instruction, u32 lanes) {
  Type to = (Type)instruction.type;
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  int bits = 8 * type_bytes(to);
  bool is_signed = type_is_signed(to);
  u64 of_nan = (Type)instruction.type2 == kF64 || bits == 64 ? 1ull << (bits - 1) : 0;
  for_each_lane(lanes, [&](int lane) {
    double x = read_float(instruction, a, lane);
    double integer = round_to_integer(x, (u8)instruction.imm);
    write_integer(to, destination, lane, x != x ? of_nan : integer_of(integer, is_signed, bits));
  });
}

static u64 saturate_integer(u64 value, bool from_signed, bool to_signed, int bits) {
  u64 highest = ~0ull >> (to_signed ? 65 - bits : 64 - bits);
  if (!from_signed) return value > highest ? highest : value;
  i64 lowest = to_signed ? -(i64)highest - 1 : 0;
  if ((i64)value < lowest) return (u64)lowest;
  return (i64)value > 0 && value > highest ? highest : value;
}
static void execute_cvt_integer_to_integer(Warp& warp, const Instruction& instruction, u32 lanes) {
  Type to = (Type)instruction.type, from = (Type)instruction.type2;
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  int bits = 8 * type_bytes(to);
  for_each_lane(lanes, [&](int lane) {
    u64 value = read_integer(from, a, lane);
    if (instruction.modifiers & kModifierSat)
      value = saturate_integer(value, type_is_signed(from), type_is_signed(to), bits);
    write_integer(to, destination, lane, value);
  });
}

static bool is_float(Type type) { return type_is_float(type) || type == kTf32; }

// For conversions without modifiers; null where there is none.
static Handler fast_handler(Type to, Type from, Rounding rounding) {
  bool nearest = rounding == kRoundNearest || rounding == kRoundNone;
  if (to == kF32 && from == kS32 && nearest) return execute_cvt_f32_s32;
  if (to == kF32 && from == kU32 && nearest) return execute_cvt_f32_u32;
  if (to == kF16 && from == kF32 && nearest) return execute_cvt_f16_f32;
  if (to == kBf16 && from == kF32 && nearest) return execute_cvt_bf16_f32;
  if (to == kF32 && from == kF16 && rounding < kRoundNearestInt) return execute_cvt_f32_f16;
  if (to == kF32 && from == kBf16 && rounding < kRoundNearestInt) return execute_cvt_f32_bf16;
  if (is_float(to) || is_float(from)) return nullptr;
  if (type_bytes(to) == 4 && type_bytes(from) == 8) return execute_cvt_u32_u64;
  if (type_bytes(to) == 8 && from == kU32) return execute_cvt_u64_u32;
  if (type_bytes(to) == 8 && from == kS32) return execute_cvt_s64_s32;
  return nullptr;
}
static Handler general_handler(Type to, Type from) {
  if (is_float(to))
    return is_float(from) ? execute_cvt_float_to_float : execute_cvt_integer_to_float;
  return is_float(from) ? execute_cvt_float_to_integer : execute_cvt_integer_to_integer;
}

static void lower_convert(Lowering& lowering, const Statement& statement) {
  if (statement.has("pack")) return lower_convert_pack(lowering, statement);
  auto types = lowering.types();
  if (types.size() != 2) lowering.unsupported();
  Type to = types[0], from = types[1];
  Rounding rounding = rounding_of(lowering);
  bool satfinite = statement.has("satfinite");
  u8 modifiers = float_modifiers(lowering);
  for (auto& word : statement.opcode)
    if (word == "rs") lowering.unsupported();
  if (lower_convert_pair(lowering, statement, to, from)) return;
  auto is_scalar = [](Type type) {
    return is_float(type) || (type >= kU8 && type <= kS64) || (type >= kB8 && type <= kB64);
  };
  if (!is_scalar(to) || !is_scalar(from)) lowering.unsupported();
  i32 a = lowering.source(statement.operands[1], from);
  i32 destination = lowering.destination(statement.operands[0], to == kTf32 ? kB32 : to);
  Handler handler = modifiers || satfinite ? nullptr : fast_handler(to, from, rounding);
  Instruction& instruction = lowering.emit(handler ? handler : general_handler(to, from),
                                           kClassConvert, {destination, a}, 1);
  instruction.type = to;
  instruction.type2 = from;
  instruction.imm = rounding;
  instruction.modifiers = modifiers;
  instruction.imm2 = satfinite;
}

static const Opcodes kOpcodes{{"cvt", lower_convert}};
}  // namespace ptxsim
