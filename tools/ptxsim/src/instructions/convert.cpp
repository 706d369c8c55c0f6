// Conversions between scalar types: cvt.
#include "instructions/convert.h"

#include <cmath>

#include "instructions/float.h"

namespace ptxsim {
// fast common conversions
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

static double round_int(double x, u8 r) {
  switch (r) {
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
// general conversion: ty = destination, ty2 = source, imm = rounding, mod = ftz/sat/relu, imm2 =
// satfinite
static void execute_cvt(Warp& warp, const Instruction& instruction, u32 lanes) {
  Type D = (Type)instruction.type, S = (Type)instruction.type2;
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  u8 r = (u8)instruction.imm;
  RoundGuard g(type_is_float(D) ? r : kRoundNone);
  for_each_lane(lanes, [&](int lane) {
    bool is_f = type_is_float(S) || S == kTf32;
    double x = 0;
    i64 s = 0;
    u64 u = 0;
    bool sgn = type_is_signed(S);
    switch (S) {
      case kS8:
        s = read_lane<i8>(a, lane);
        break;
      case kS16:
        s = read_lane<i16>(a, lane);
        break;
      case kS32:
        s = read_lane<i32>(a, lane);
        break;
      case kS64:
        s = read_lane<i64>(a, lane);
        break;
      case kU8:
      case kB8:
        u = read_lane<u8>(a, lane);
        break;
      case kU16:
      case kB16:
        u = read_lane<u16>(a, lane);
        break;
      case kU32:
      case kB32:
        u = read_lane<u32>(a, lane);
        break;
      case kU64:
      case kB64:
        u = read_lane<u64>(a, lane);
        break;
      case kF16:
        x = half_bits_to_float(read_lane<u16>(a, lane));
        break;
      case kBf16:
        x = bf16_to_float(read_lane<u16>(a, lane));
        break;
      case kF32: {
        float f = read_lane<float>(a, lane);
        if (instruction.modifiers & kModifierFtz) f = flush_subnormal(f);
        x = f;
        break;
      }
      case kF64:
        x = read_lane<double>(a, lane);
        break;
      default:
        break;
    }
    if (type_is_float(D) || D == kTf32) {
      if (!is_f) {
        if (D == kF32) {
          volatile float f = sgn ? (float)s : (float)u;
          float q = f;
          if (instruction.modifiers & kModifierSat) q = saturate(q);
          write_lane<float>(destination, lane, q);
        } else if (D == kF64) {
          volatile double f = sgn ? (double)s : (double)u;
          write_lane<double>(destination, lane, (double)f);
        } else {
          double v =
              sgn ? (double)s : (double)u;  // exact below 2^53, beyond which f16 overflows anyway
          write_lane<u16>(destination, lane,
                          (u16)to_small(v, D == kF16 ? kSmallF16 : kSmallBf16,
                                        r == kRoundNone ? kRoundNearest : (Rounding)r));
        }
      } else {
        if (r >= kRoundNearestInt) {
          double q = round_int(x, r);
          x = q == 0 ? std::copysign(0.0, x) : q;
        }
        bool nan = x != x;
        if (D == kF32) {
          volatile float f = (float)x;
          float q = canonical_nan((float)f);
          if (instruction.modifiers & kModifierFtz) q = flush_subnormal(q);
          if (instruction.modifiers & kModifierSat) q = saturate(q);
          if ((instruction.modifiers & kModifierRelu) && q < 0) q = 0;
          write_lane<float>(destination, lane, q);
        } else if (D == kF64) {
          double q = canonical_nan(x);
          if (instruction.modifiers & kModifierSat) q = nan ? 0 : q < 0 ? 0 : q > 1 ? 1 : q;
          write_lane<double>(destination, lane, q);
        } else if (D == kTf32) {
          u32 b = to_small(x, kSmallTf32, r == kRoundNone ? kRoundNearestAway : (Rounding)r,
                           instruction.imm2);
          if ((instruction.modifiers & kModifierRelu) && (b >> 18) && !nan) b = 0;
          write_lane<u32>(destination, lane, nan ? 0x7fffffffu : b << 13);
        } else {
          SmallFloat format_kind = D == kF16 ? kSmallF16 : kSmallBf16;
          u32 b;
          if ((instruction.modifiers & kModifierSat))
            b = nan ? 0 : to_small(x < 0 ? 0 : x > 1 ? 1 : x, format_kind, (Rounding)r);
          else
            b = to_small(x, format_kind,
                         r == kRoundNone || r >= kRoundNearestInt ? kRoundNearest : (Rounding)r,
                         instruction.imm2);
          if ((instruction.modifiers & kModifierRelu) && (b & 0x8000) && !nan) b = 0;
          write_lane<u16>(destination, lane, (u16)b);
        }
      }
    } else {
      int bits = 8 * type_bytes(D);
      bool ds = type_is_signed(D);
      u64 out;
      if (is_f) {
        double q = round_int(x, r);
        if (x != x)
          out = (S == kF64 || bits == 64) ? (1ull << (bits - 1)) : 0;
        else if (ds) {
          double lo = -std::ldexp(1.0, bits - 1);
          double hi = std::ldexp(1.0, bits - 1);
          out = q < lo ? (u64)1 << (bits - 1) : q >= hi ? ((u64)1 << (bits - 1)) - 1 : (u64)(i64)q;
        } else {
          double hi = std::ldexp(1.0, bits);
          out = q <= 0 ? 0 : q >= hi ? (bits == 64 ? ~0ull : (1ull << bits) - 1) : (u64)q;
        }
      } else {
        u64 v = sgn ? (u64)s : u;
        if (instruction.modifiers & kModifierSat) {
          if (ds) {
            i64 hi = bits == 64 ? INT64_MAX : (1ll << (bits - 1)) - 1;
            i64 lo = -hi - 1;
            if (sgn)
              v = (u64)(s < lo ? lo : s > hi ? hi : s);
            else
              v = u > (u64)hi ? (u64)hi : u;
          } else {
            u64 hi = bits == 64 ? ~0ull : (1ull << bits) - 1;
            if (sgn)
              v = s < 0 ? 0 : (u64)s > hi ? hi : (u64)s;
            else
              v = u > hi ? hi : u;
          }
        }
        out = v;
      }
      if (bits == 64)
        write_lane<u64>(destination, lane, out);
      else {
        // registers wider than the type hold the sign- or zero-extended value
        u32 o32 = (u32)out;
        if (bits == 8)
          o32 = ds ? (u32)(i32)(i8)o32 : (o32 & 0xff);
        else if (bits == 16)
          o32 = ds ? (u32)(i32)(i16)o32 : (o32 & 0xffff);
        ((u32*)destination)[lane] = o32;
      }
    }
  });
}
static void lower_convert(Lowering& lowering, const Statement& statement) {
  if (statement.has("pack")) return lower_convert_pack(lowering, statement);
  auto ts = lowering.types();
  if (ts.size() != 2) lowering.unsupported();
  Type D = ts[0], S = ts[1];
  Rounding rounding = rounding_of(lowering);
  bool satf_ = statement.has("satfinite");
  u8 f = float_modifiers(lowering);
  for (auto& m : statement.opcode)
    if (m == "rs") lowering.unsupported();
  if (lower_convert_pair(lowering, statement, D, S)) return;
  auto ok = [](Type type) {
    return type_is_float(type) || type == kTf32 || (type >= kU8 && type <= kS64) ||
           (type >= kB8 && type <= kB64);
  };
  if (!ok(D) || !ok(S)) lowering.unsupported();
  i32 a = lowering.source(statement.operands[1], S);
  i32 d = lowering.destination(statement.operands[0], D == kTf32 ? kB32 : D);
  Handler handler = nullptr;
  bool plain = !f && !satf_, rn = rounding == kRoundNearest || rounding == kRoundNone;
  if (plain) {
    if (D == kF32 && S == kS32 && rn)
      handler = execute_cvt_f32_s32;
    else if (D == kF32 && S == kU32 && rn)
      handler = execute_cvt_f32_u32;
    else if (D == kF16 && S == kF32 && rn)
      handler = execute_cvt_f16_f32;
    else if (D == kBf16 && S == kF32 && rn)
      handler = execute_cvt_bf16_f32;
    else if (D == kF32 && S == kF16 && rounding < kRoundNearestInt)
      handler = execute_cvt_f32_f16;
    else if (D == kF32 && S == kBf16 && rounding < kRoundNearestInt)
      handler = execute_cvt_f32_bf16;
    else if (type_bytes(D) == 4 && !type_is_float(D) && D != kTf32 && type_bytes(S) == 8 &&
             !type_is_float(S))
      handler = execute_cvt_u32_u64;
    else if (type_bytes(D) == 8 && !type_is_float(D) && S == kU32)
      handler = execute_cvt_u64_u32;
    else if (type_bytes(D) == 8 && !type_is_float(D) && S == kS32)
      handler = execute_cvt_s64_s32;
  }
  Instruction& instruction =
      lowering.emit(handler ? handler : execute_cvt, kClassConvert, {d, a}, 1);
  instruction.type = D;
  instruction.type2 = S;
  instruction.imm = rounding;
  instruction.modifiers = f;
  instruction.imm2 = satf_;
}

static const Opcodes kOpcodes{{"cvt", lower_convert}};
}  // namespace ptxsim
