// Conversions to and from packed types.
#include <cmath>

#include "instructions/convert.h"

namespace ptxsim {
// cvt to packed pairs from two floats: a -> upper, b -> lower
static void execute_cvt_pair_f32(Warp& warp, const Instruction& instruction,
                                 u32 lanes) {  // imm: Small kind, imm2: satfinite, ty2: rounding
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const float *a = warp.source<float>(instruction.operands[1]),
              *b = warp.source<float>(instruction.operands[2]);
  SmallFloat format_kind = (SmallFloat)instruction.imm;
  int sh = format_kind == kSmallF16 || format_kind == kSmallBf16 ? 16 : 8;
  u32 sb = 1u << small_sign_bit(format_kind);
  for_each_lane(lanes, [&](int lane) {
    u32 h;
    u32 l;
    if (format_kind == kSmallF16 && instruction.type2 == kRoundNearest && !instruction.imm2) {
      h = float_to_half_bits(a[lane]);
      l = float_to_half_bits(b[lane]);
    } else {
      h = to_small(a[lane], format_kind, (Rounding)instruction.type2, instruction.imm2);
      l = to_small(b[lane], format_kind, (Rounding)instruction.type2, instruction.imm2);
    }
    if (instruction.modifiers & kModifierRelu) {
      if ((h & sb) && a[lane] == a[lane]) h = 0;
      if ((l & sb) && b[lane] == b[lane]) l = 0;
    }
    destination[lane] = (h << sh) | l;
  });
}
static void execute_cvt_f8_f16x2(Warp& warp, const Instruction& instruction,
                                 u32 lanes) {  // f16x2 -> e4m3x2/e5m2x2
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  SmallFloat format_kind = (SmallFloat)instruction.imm;
  for_each_lane(lanes, [&](int lane) {
    float h = half_bits_to_float((u16)(a[lane] >> 16));
    float l = half_bits_to_float((u16)a[lane]);
    u32 x = to_small(h, format_kind, kRoundNearest, true);
    u32 y = to_small(l, format_kind, kRoundNearest, true);
    if (instruction.modifiers & kModifierRelu) {
      if ((x & 0x80) && h == h) x = 0;
      if ((y & 0x80) && l == l) y = 0;
    }
    destination[lane] = (x << 8) | y;
  });
}
static void execute_cvt_f16x2_f8(Warp& warp, const Instruction& instruction,
                                 u32 lanes) {  // e4m3x2/e5m2x2 -> f16x2
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  SmallFloat format_kind = (SmallFloat)instruction.imm;
  for_each_lane(lanes, [&](int lane) {
    u32 h = to_small(from_small((a[lane] >> 8) & 0xff, format_kind), kSmallF16);
    u32 l = to_small(from_small(a[lane] & 0xff, format_kind), kSmallF16);
    if (instruction.modifiers & kModifierRelu) {
      if (h & 0x8000) h = 0;
      if (l & 0x8000) l = 0;
    }
    destination[lane] = (h << 16) | l;
  });
}
static void execute_cvt_pack(Warp& warp, const Instruction& instruction,
                             u32 lanes) {  // imm: bits, imm2: signed; o: d a b [c]
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const i32 *a = warp.source<i32>(instruction.operands[1]),
            *b = warp.source<i32>(instruction.operands[2]);
  const u32* c =
      instruction.operand_count > 3 ? warp.source<u32>(instruction.operands[3]) : nullptr;
  int bits = (int)instruction.imm;
  i32 hi = instruction.imm2 ? (1 << (bits - 1)) - 1 : (1 << bits) - 1,
      lo = instruction.imm2 ? -(1 << (bits - 1)) : 0;
  u32 mask = bits == 32 ? ~0u : (1u << bits) - 1;
  for_each_lane(lanes, [&](int lane) {
    i32 x = a[lane] < lo ? lo : a[lane] > hi ? hi : a[lane];
    i32 y = b[lane] < lo ? lo : b[lane] > hi ? hi : b[lane];
    u32 r = (((u32)x & mask) << bits) | ((u32)y & mask);
    if (c) r |= c[lane] << (2 * bits);
    destination[lane] = r;
  });
}

void lower_convert_pack(Lowering& lowering, const Statement& statement) {
  // convertType abType [cType]; s4/u4/s2/u2 types
  int bits = 0;
  bool sg = false;
  for (auto& m : statement.opcode) {
    if (m == "u16" || m == "s16")
      bits = 16, sg = m[0] == 's';
    else if (m == "u8" || m == "s8")
      bits = 8, sg = m[0] == 's';
    else if (m == "u4" || m == "s4")
      bits = 4, sg = m[0] == 's';
    else if (m == "u2" || m == "s2")
      bits = 2, sg = m[0] == 's';
  }
  std::vector<i32> ids{lowering.source(statement.operands[1], kS32),
                       lowering.source(statement.operands[2], kS32)};
  if (statement.operands.size() > 3) ids.push_back(lowering.source(statement.operands[3], kB32));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], kB32));
  Instruction& instruction = lowering.emit(execute_cvt_pack, kClassConvert, ids, 1);
  instruction.imm = (u32)bits;
  instruction.imm2 = sg;
}

bool lower_convert_pair(Lowering& lowering, const Statement& statement, Type to, Type from) {
  Rounding rounding = rounding_of(lowering);
  bool satf_ = statement.has("satfinite");
  u8 f = float_modifiers(lowering);
  if (from == kF32 && (to == kF16x2 || to == kBf16x2 || to == kE4m3x2 || to == kE5m2x2)) {
    i32 a = lowering.source(statement.operands[1], kF32),
        b = lowering.source(statement.operands[2], kF32);
    bool f8 = to == kE4m3x2 || to == kE5m2x2;
    Instruction& instruction =
        lowering.emit(execute_cvt_pair_f32, kClassConvert,
                      {lowering.destination(statement.operands[0], f8 ? kB16 : kB32), a, b}, 1);
    instruction.imm = to == kF16x2    ? kSmallF16
                      : to == kBf16x2 ? kSmallBf16
                      : to == kE4m3x2 ? kSmallE4m3
                                      : kSmallE5m2;
    instruction.imm2 = satf_;
    instruction.type2 = rounding;
    instruction.modifiers = f;
    return true;
  }
  if (from == kF16x2 && (to == kE4m3x2 || to == kE5m2x2)) {
    i32 a = lowering.source(statement.operands[1], kB32);
    Instruction& instruction =
        lowering.emit(execute_cvt_f8_f16x2, kClassConvert,
                      {lowering.destination(statement.operands[0], kB16), a}, 1);
    instruction.imm = to == kE4m3x2 ? kSmallE4m3 : kSmallE5m2;
    instruction.modifiers = f;
    return true;
  }
  if (to == kF16x2 && (from == kE4m3x2 || from == kE5m2x2)) {
    i32 a = lowering.source(statement.operands[1], kB16);
    Instruction& instruction =
        lowering.emit(execute_cvt_f16x2_f8, kClassConvert,
                      {lowering.destination(statement.operands[0], kB32), a}, 1);
    instruction.imm = from == kE4m3x2 ? kSmallE4m3 : kSmallE5m2;
    instruction.modifiers = f;
    return true;
  }
  return false;
}
}  // namespace ptxsim
