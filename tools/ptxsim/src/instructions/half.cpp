// Arithmetic on f16 and bf16, single and packed.
#include "instructions/half.h"

#include <cmath>

#include "instructions/float.h"

namespace ptxsim {
template <int K>
static u16 half_operation(const Instruction& instruction, int op, u16 x, u16 y, u16 z) {
  if (instruction.modifiers & kModifierFtz) {
    x = half_ftz<K>(x);
    y = half_ftz<K>(y);
    z = half_ftz<K>(z);
  }
  u16 result;
  float a = half_to_float<K>(x), b = half_to_float<K>(y);
  switch (op) {
    case kHalfAdd:
      result = half_from_float<K>(a + b);
      break;  // float holds >= 2p+2 bits: double rounding is harmless
    case kHalfSub:
      result = half_from_float<K>(a - b);
      break;
    case kHalfMul:
      result = half_from_float<K>(a * b);
      break;
    case kHalfFma:
      result = half_from_double<K>(fma_round_to_odd(a, b, half_to_float<K>(z)));
      break;
    case kHalfNeg:
      return (u16)(x ^ 0x8000);
    case kHalfAbs:
      return (u16)(x & 0x7fff);
    case kHalfMin:
      result = half_from_float<K>(float_min_max<float>(instruction, a, b, false));
      break;
    case kHalfMax:
      result = half_from_float<K>(float_min_max<float>(instruction, a, b, true));
      break;
    case kHalfEx2:
      result = half_from_double<K>(std::exp2((double)a));
      break;
    default:
      result = half_from_double<K>(std::tanh((double)a));
      break;
  }
  if (instruction.modifiers & kModifierFtz) result = half_ftz<K>(result);
  bool nan = (result & 0x7fff) > (K == 0 ? 0x7c00 : 0x7f80);
  if (instruction.modifiers & kModifierSat) {
    float f = half_to_float<K>(result);
    result = half_from_float<K>(saturate(f));
  }
  if (instruction.modifiers & kModifierRelu) {
    if (!nan && (result & 0x8000)) result = 0;
  }
  return result;
}
// imm: the operation, imm2: whether of both halves.
template <int K>
static void execute_half(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32* a = warp.source<u32>(instruction.operands[1]);
  const u32* b = instruction.operand_count > 2 ? warp.source<u32>(instruction.operands[2]) : a;
  const u32* c = instruction.operand_count > 3 ? warp.source<u32>(instruction.operands[3]) : a;
  for_each_lane(lanes, [&](int lane) {
    u32 result = half_operation<K>(instruction, (int)instruction.imm, (u16)a[lane], (u16)b[lane],
                                   (u16)c[lane]);
    if (instruction.imm2)
      result |= (u32)half_operation<K>(instruction, (int)instruction.imm, (u16)(a[lane] >> 16),
                                       (u16)(b[lane] >> 16), (u16)(c[lane] >> 16))
                << 16;
    destination[lane] = result;
  });
}
void lower_half(Lowering& lowering, const Statement& statement, Type type, int op, int sources) {
  std::vector<i32> ids;
  bool packed = type == kF16x2 || type == kBf16x2;
  Type register_type = packed ? kB32 : kB16;
  for (int k = 0; k < sources; k++)
    ids.push_back(lowering.source(statement.operands[1 + k], register_type));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], register_type));
  Instruction& instruction = lowering.emit(
      type == kF16 || type == kF16x2 ? execute_half<0> : execute_half<1>, kClassFloat, ids, 1);
  instruction.imm = (u32)op;
  instruction.imm2 = packed;
  instruction.modifiers = float_modifiers(lowering);
}

}  // namespace ptxsim
