// Approximate functions of floats, sqrt, copysign and testp.
#include <cmath>

#include "instructions/float.h"
#include "instructions/half.h"

namespace ptxsim {
enum {
  kApproxRcp,
  kApproxRsqrt,
  kApproxSqrt,
  kApproxSin,
  kApproxCos,
  kApproxLg2,
  kApproxEx2,
  kApproxTanh
};
template <class T>
static void execute_approx(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T* a = warp.source<T>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) {
    T value = a[lane];
    if constexpr (sizeof(T) == 4)
      if (instruction.modifiers & kModifierFtz) value = flush_subnormal(value);
    double x = value;
    double exact = 0;
    switch (instruction.imm) {
      case kApproxRcp:
        exact = 1.0 / x;
        break;
      case kApproxRsqrt:
        exact = 1.0 / std::sqrt(x);
        break;
      case kApproxSqrt:
        exact = std::sqrt(x);
        break;
      case kApproxSin:
        exact = std::sin(x);
        break;
      case kApproxCos:
        exact = std::cos(x);
        break;
      case kApproxLg2:
        exact = std::log2(x);
        break;
      case kApproxEx2:
        exact = std::exp2(x);
        break;
      case kApproxTanh:
        exact = std::tanh(x);
        break;
    }
    T result = canonical_nan((T)exact);
    if constexpr (sizeof(T) == 4)
      if (instruction.modifiers & kModifierFtz) result = flush_subnormal(result);
    destination[lane] = result;
  });
}
static void execute_div_approx(Warp& warp, const Instruction& instruction, u32 lanes) {
  float* destination = warp.destination<float>(instruction.operands[0]);
  const float *a = warp.source<float>(instruction.operands[1]),
              *b = warp.source<float>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    float x = a[lane];
    float y = b[lane];
    if (instruction.modifiers & kModifierFtz) {
      x = flush_subnormal(x);
      y = flush_subnormal(y);
    }
    float result = canonical_nan(x / y);
    destination[lane] = (instruction.modifiers & kModifierFtz) ? flush_subnormal(result) : result;
  });
}

void lower_float_div_approx(Lowering& lowering, Type type) {
  emit_simple(lowering, execute_div_approx, kClassFloat, type, {type, type});
  lowering.kernel.code.back().modifiers = float_modifiers(lowering);
}

// imm: index of the property's name in lower_testp.
static void execute_testp(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 result = 0;
  const void* a = warp.source(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) {
    double x =
        instruction.type == kF64 ? read_lane<double>(a, lane) : (double)read_lane<float>(a, lane);
    bool subnormal = instruction.type == kF64
                         ? std::fpclassify(x) == FP_SUBNORMAL
                         : std::fpclassify(read_lane<float>(a, lane)) == FP_SUBNORMAL;
    bool holds = false;
    switch (instruction.imm) {
      case 0:
        holds = std::isfinite(x);
        break;
      case 1:
        holds = std::isinf(x);
        break;
      case 2:
        holds = x == x;
        break;
      case 3:
        holds = x != x;
        break;
      case 4:
        holds = std::isfinite(x) && x != 0 && !subnormal;
        break;
      default:
        holds = subnormal;
        break;
    }
    result |= (u32)holds << lane;
  });
  write_predicate(warp, instruction.operands[0], result, lanes);
}

static void lower_sqrt(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  if (statement.has("approx")) {
    emit_simple(lowering, type == kF64 ? execute_approx<double> : execute_approx<float>,
                kClassFloat, type, {type});
    lowering.kernel.code.back().imm = kApproxSqrt;
    lowering.kernel.code.back().modifiers = float_modifiers(lowering);
    return;
  }
  lower_float(lowering, statement, type, kFloatSqrt);
}

static void lower_approx(Lowering& lowering, const Statement& statement) {
  auto is = [&](const char* name) { return statement.name() == name; };
  Type type = lowering.last_type();
  if (is_half(type)) {
    if (is("ex2")) return lower_half(lowering, statement, type, kHalfEx2, 1);
    if (is("tanh")) return lower_half(lowering, statement, type, kHalfTanh, 1);
    lowering.unsupported();
  }
  if (is("rcp") && !statement.has("approx")) return lower_reciprocal(lowering, statement, type);
  u32 function = is("rcp")     ? kApproxRcp
                 : is("rsqrt") ? kApproxRsqrt
                 : is("sin")   ? kApproxSin
                 : is("cos")   ? kApproxCos
                 : is("lg2")   ? kApproxLg2
                 : is("ex2")   ? kApproxEx2
                               : kApproxTanh;
  emit_simple(lowering, type == kF64 ? execute_approx<double> : execute_approx<float>, kClassFloat,
              type, {type});
  lowering.kernel.code.back().imm = function;
  lowering.kernel.code.back().modifiers = float_modifiers(lowering);
}

static void lower_copysign(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();  // d = |b| with the sign of a
  if (type == kF32)
    emit_simple(
        lowering,
        binary<u32, u32, u32, [](u32 a, u32 b) { return (b & 0x7fffffffu) | (a & 0x80000000u); }>,
        kClassFloat, type, {type, type});
  else
    emit_simple(lowering,
                binary<u64, u64, u64,
                       [](u64 a, u64 b) { return (b & ~(1ull << 63)) | (a & (1ull << 63)); }>,
                kClassFloat, type, {type, type});
}

static void lower_testp(Lowering& lowering, const Statement& statement) {
  static const char* names[] = {"finite",     "infinite", "number",
                                "notanumber", "normal",   "subnormal"};
  Type type = lowering.last_type();
  i32 a = lowering.source(statement.operands[1], type);
  Instruction& instruction =
      lowering.emit(execute_testp, kClassPredicate,
                    {lowering.predicate_destination(statement.operands[0]), a}, 1);
  instruction.type = type;
  for (u32 k = 0; k < 6; k++)
    if (statement.has(names[k])) instruction.imm = k;
}

static const Opcodes kOpcodes{{"sqrt", lower_sqrt},         {"rcp", lower_approx},
                              {"rsqrt", lower_approx},      {"sin", lower_approx},
                              {"cos", lower_approx},        {"lg2", lower_approx},
                              {"ex2", lower_approx},        {"tanh", lower_approx},
                              {"copysign", lower_copysign}, {"testp", lower_testp}};
}  // namespace ptxsim
