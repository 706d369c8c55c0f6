// Conversions to and from packed types.
#include <cmath>

#include "instructions/convert.h"

namespace ptxsim {
// One of a pair.
static u32 small_float(const Instruction& instruction, double x, SmallFloat format,
                       Rounding rounding, bool satfinite) {
  u32 bits = to_small(x, format, rounding, satfinite);
  bool negative = (bits >> small_sign_bit(format)) & 1 && x == x;
  return (instruction.modifiers & kModifierRelu) && negative ? 0 : bits;
}
// f32, f32 -> f16x2, bf16x2, e4m3x2 or e5m2x2: a becomes the upper one. imm: the format, imm2:
// satfinite, type2: the rounding.
static void execute_cvt_pair_f32(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const float *a = warp.source<float>(instruction.operands[1]),
              *b = warp.source<float>(instruction.operands[2]);
  SmallFloat format = (SmallFloat)instruction.imm;
  Rounding rounding = (Rounding)instruction.type2;
  bool satfinite = instruction.imm2, relu = instruction.modifiers & kModifierRelu;
  if (format == kSmallF16 && rounding == kRoundNearest && !satfinite && !relu) {
    for_each_lane(lanes, [&](int lane) {
      destination[lane] = ((u32)float_to_half_bits(a[lane]) << 16) | float_to_half_bits(b[lane]);
    });
    return;
  }
  int bits = small_sign_bit(format) + 1;
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = (small_float(instruction, a[lane], format, rounding, satfinite) << bits) |
                        small_float(instruction, b[lane], format, rounding, satfinite);
  });
}
// f16x2 -> e4m3x2 or e5m2x2; imm: the format.
static void execute_cvt_f8_f16x2(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  SmallFloat format = (SmallFloat)instruction.imm;
  auto convert = [&](u32 bits) {
    return small_float(instruction, half_bits_to_float((u16)bits), format, kRoundNearest, true);
  };
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = (convert(a[lane] >> 16) << 8) | convert(a[lane]);
  });
}
// e4m3x2 or e5m2x2 -> f16x2; imm: the format.
static void execute_cvt_f16x2_f8(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  SmallFloat format = (SmallFloat)instruction.imm;
  auto convert = [&](u32 bits) {
    return small_float(instruction, from_small(bits & 0xff, format), kSmallF16, kRoundNearest,
                       false);
  };
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = (convert(a[lane] >> 8) << 16) | convert(a[lane]);
  });
}
// imm: bits of an element, imm2: signed. c, if given, becomes the upper part of the result.
static void execute_cvt_pack(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const i32 *a = warp.source<i32>(instruction.operands[1]),
            *b = warp.source<i32>(instruction.operands[2]);
  const u32* c =
      instruction.operand_count > 3 ? warp.source<u32>(instruction.operands[3]) : nullptr;
  int bits = (int)instruction.imm;
  i32 lowest = instruction.imm2 ? -(1 << (bits - 1)) : 0;
  i32 highest = instruction.imm2 ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  u32 mask = (1u << bits) - 1;
  auto saturated = [&](i32 x) {
    return (u32)(x < lowest ? lowest : x > highest ? highest : x) & mask;
  };
  for_each_lane(lanes, [&](int lane) {
    u32 packed = (saturated(a[lane]) << bits) | saturated(b[lane]);
    destination[lane] = c ? packed | c[lane] << (2 * bits) : packed;
  });
}

void lower_convert_pack(Lowering& lowering, const Statement& statement) {
  // convertType abType [cType]
  static const std::pair<const char*, u32> widths[] = {{"16", 16}, {"8", 8}, {"4", 4}, {"2", 2}};
  u32 bits = 0;
  bool is_signed = false;
  for (auto& word : statement.opcode)
    for (auto& [digits, width] : widths)
      if ((word[0] == 'u' || word[0] == 's') && word.substr(1) == digits) {
        bits = width;
        is_signed = word[0] == 's';
      }
  std::vector<i32> ids{lowering.source(statement.operands[1], kS32),
                       lowering.source(statement.operands[2], kS32)};
  if (statement.operands.size() > 3) ids.push_back(lowering.source(statement.operands[3], kB32));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], kB32));
  Instruction& instruction = lowering.emit(execute_cvt_pack, kClassConvert, ids, 1);
  instruction.imm = bits;
  instruction.imm2 = is_signed;
}

static bool is_f8_pair(Type type) { return type == kE4m3x2 || type == kE5m2x2; }
static SmallFloat format_of(Type pair) {
  return pair == kF16x2    ? kSmallF16
         : pair == kBf16x2 ? kSmallBf16
         : pair == kE4m3x2 ? kSmallE4m3
                           : kSmallE5m2;
}

bool lower_convert_pair(Lowering& lowering, const Statement& statement, Type to, Type from) {
  auto emit = [&](Handler handler, Type destination, std::initializer_list<Type> sources,
                  Type format) {
    emit_simple(lowering, handler, kClassConvert, destination, sources);
    Instruction& instruction = lowering.kernel.code.back();
    instruction.imm = format_of(format);
    instruction.imm2 = statement.has("satfinite");
    instruction.type2 = rounding_of(lowering);
    instruction.modifiers = float_modifiers(lowering);
    return true;
  };
  if (from == kF32 && is_f8_pair(to)) return emit(execute_cvt_pair_f32, kB16, {kF32, kF32}, to);
  if (from == kF32 && (to == kF16x2 || to == kBf16x2))
    return emit(execute_cvt_pair_f32, kB32, {kF32, kF32}, to);
  if (from == kF16x2 && is_f8_pair(to)) return emit(execute_cvt_f8_f16x2, kB16, {kB32}, to);
  if (to == kF16x2 && is_f8_pair(from)) return emit(execute_cvt_f16x2_f8, kB32, {kB16}, from);
  return false;
}
}  // namespace ptxsim
