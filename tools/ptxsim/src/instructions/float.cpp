// Float arithmetic with IEEE rounding.
#include "instructions/float.h"

#include <type_traits>

namespace ptxsim {
template <FloatOperation OP, class T>
static inline T float_operation(T a, T b, T c) {
  if constexpr (OP == kFloatAdd)
    return a + b;
  else if constexpr (OP == kFloatSub)
    return a - b;
  else if constexpr (OP == kFloatMul)
    return a * b;
  else if constexpr (OP == kFloatFma)
    return std::fma(a, b, c);
  else if constexpr (OP == kFloatDiv)
    return a / b;
  else
    return std::sqrt(a);
}
// the common case: round to nearest, no modifiers
template <FloatOperation OP, class T>
static void float_plain(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T* a = warp.source<T>(instruction.operands[1]);
  const T* b = OP == kFloatSqrt ? a : warp.source<T>(instruction.operands[2]);
  const T* c = OP == kFloatFma ? warp.source<T>(instruction.operands[3]) : a;
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = canonical_nan(float_operation<OP, T>(a[lane], b[lane], c[lane]));
  });
}
// directed rounding, ftz, saturation
template <FloatOperation OP, class T>
static void float_modified(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T* a = warp.source<T>(instruction.operands[1]);
  const T* b = OP == kFloatSqrt ? a : warp.source<T>(instruction.operands[2]);
  const T* c = OP == kFloatFma ? warp.source<T>(instruction.operands[3]) : a;
  RoundGuard guard(instruction.type2);
  for_each_lane(lanes, [&](int lane) {
    volatile T x = a[lane];
    volatile T y = b[lane];
    volatile T z = c[lane];
    if constexpr (sizeof(T) == 4)
      if (instruction.modifiers & kModifierFtz) {
        x = flush_subnormal(x);
        y = flush_subnormal(y);
        z = flush_subnormal(z);
      }
    volatile T rounded = float_operation<OP, T>(x, y, z);
    T result = canonical_nan((T)rounded);
    if constexpr (sizeof(T) == 4) {
      if (instruction.modifiers & kModifierFtz) result = flush_subnormal(result);
      if (instruction.modifiers & kModifierSat) result = saturate(result);
    }
    destination[lane] = result;
  });
}
template <FloatOperation OP>
static Handler pick_float(Type type, bool slow) {
  if (type == kF32) return slow ? float_modified<OP, float> : float_plain<OP, float>;
  return slow ? float_modified<OP, double> : float_plain<OP, double>;
}
// Pairs of floats in 64-bit registers.
template <FloatOperation OP>
static void float_pair(Warp& warp, const Instruction& instruction, u32 lanes) {
  float* destination = warp.destination<float>(instruction.operands[0]);
  const float *a = warp.source<float>(instruction.operands[1]),
              *b = warp.source<float>(instruction.operands[2]);
  const float* c = OP == kFloatFma ? warp.source<float>(instruction.operands[3]) : a;
  RoundGuard guard(instruction.type2);
  for_each_lane(lanes, [&](int lane) {
    for (int k = 2 * lane; k < 2 * lane + 2; k++) {
      float x = a[k];
      float y = b[k];
      float z = c[k];
      if (instruction.modifiers & kModifierFtz) {
        x = flush_subnormal(x);
        y = flush_subnormal(y);
        z = flush_subnormal(z);
      }
      float result = canonical_nan(float_operation<OP, float>(x, y, z));
      destination[k] = (instruction.modifiers & kModifierFtz) ? flush_subnormal(result) : result;
    }
  });
}

template <class T>
static void execute_f_min(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  if (instruction.operand_count == 4) {
    const T* c = warp.source<T>(instruction.operands[3]);
    for_each_lane(lanes, [&](int lane) {
      destination[lane] = float_min_max<T>(
          instruction, float_min_max<T>(instruction, a[lane], b[lane], instruction.imm), c[lane],
          instruction.imm);
    });
    return;
  }
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = float_min_max<T>(instruction, a[lane], b[lane], instruction.imm);
  });
}

template <FloatOperation OP>
static void lower_float_arithmetic(Lowering& lowering, const Statement& statement, Type type,
                                   int sources) {
  Rounding rounding = rounding_of(lowering);
  u8 modifiers = float_modifiers(lowering);
  std::vector<i32> ids;
  if (type == kF32x2) {
    for (int k = 0; k < sources; k++)
      ids.push_back(lowering.source(statement.operands[1 + k], kB64));
    ids.insert(ids.begin(), lowering.destination(statement.operands[0], kB64));
    Instruction& instruction = lowering.emit(float_pair<OP>, kClassFloat, ids, 1);
    instruction.type2 = rounding;
    instruction.modifiers = modifiers;
    return;
  }
  for (int k = 0; k < sources; k++) ids.push_back(lowering.source(statement.operands[1 + k], type));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], type));
  bool slow = modifiers || (rounding != kRoundNone && rounding != kRoundNearest);
  Instruction& instruction = lowering.emit(pick_float<OP>(type, slow), kClassFloat, ids, 1);
  instruction.type2 = rounding;
  instruction.modifiers = modifiers;
}

void lower_float(Lowering& lowering, const Statement& statement, Type type,
                 FloatOperation operation) {
  switch (operation) {
    case kFloatAdd:
      return lower_float_arithmetic<kFloatAdd>(lowering, statement, type, 2);
    case kFloatSub:
      return lower_float_arithmetic<kFloatSub>(lowering, statement, type, 2);
    case kFloatMul:
      return lower_float_arithmetic<kFloatMul>(lowering, statement, type, 2);
    case kFloatFma:
      return lower_float_arithmetic<kFloatFma>(lowering, statement, type, 3);
    case kFloatDiv:
      return lower_float_arithmetic<kFloatDiv>(lowering, statement, type, 2);
    case kFloatSqrt:
      return lower_float_arithmetic<kFloatSqrt>(lowering, statement, type, 1);
  }
}

void lower_float_min(Lowering& lowering, const Statement& statement, Type type) {
  std::vector<i32> ids;
  for (size_t k = 1; k < statement.operands.size(); k++)
    ids.push_back(lowering.source(statement.operands[k], type));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], type));
  Instruction& instruction = lowering.emit(
      type == kF32 ? execute_f_min<float> : execute_f_min<double>, kClassFloat, ids, 1);
  instruction.imm = statement.name() == "max";
  instruction.modifiers = float_modifiers(lowering);
}

void lower_float_abs(Lowering& lowering, const Statement& statement, Type type) {
  bool is_abs = statement.name() == "abs";
  if (type == kF32) {
    bool ftz = statement.has("ftz");
    if (is_abs)
      emit_simple(
          lowering,
          ftz ? unary<u32, u32,
                      [](u32 a) {
                        return bits_to<u32>(flush_subnormal(bits_to<float>(a & 0x7fffffffu)));
                      }>
              : unary<u32, u32, [](u32 a) { return a & 0x7fffffffu; }>,
          kClassFloat, type, {type});
    else
      emit_simple(
          lowering,
          ftz ? unary<u32, u32,
                      [](u32 a) {
                        return bits_to<u32>(flush_subnormal(bits_to<float>(a ^ 0x80000000u)));
                      }>
              : unary<u32, u32, [](u32 a) { return a ^ 0x80000000u; }>,
          kClassFloat, type, {type});
  } else if (type == kF64) {
    if (is_abs)
      emit_simple(lowering, unary<u64, u64, [](u64 a) { return a & ~(1ull << 63); }>, kClassFloat,
                  type, {type});
    else
      emit_simple(lowering, unary<u64, u64, [](u64 a) { return a ^ (1ull << 63); }>, kClassFloat,
                  type, {type});
  }
}

// 1/x with IEEE rounding
void lower_reciprocal(Lowering& lowering, const Statement& statement, Type type) {
  Rounding rounding = rounding_of(lowering);
  i32 a = lowering.source(statement.operands[1], type);
  i32 one = type == kF64 ? lowering.constant(0x3ff0000000000000ull, 8)
                         : lowering.constant(0x3f800000u, 4);
  u8 modifiers = float_modifiers(lowering);
  Instruction& instruction =
      lowering.emit(pick_float<kFloatDiv>(type, modifiers || rounding != kRoundNearest),
                    kClassFloat, {lowering.destination(statement.operands[0], type), one, a}, 1);
  instruction.type2 = rounding;
  instruction.modifiers = modifiers;
}
}  // namespace ptxsim
