// Instructions whose opcode serves integers, floats and halves: the type decides.
#include "instructions/float.h"
#include "instructions/half.h"
#include "instructions/handlers.h"
#include "instructions/integer.h"

namespace ptxsim {
u8 float_modifiers(Lowering& lowering) {
  u8 modifiers = 0;
  if (lowering.has("ftz")) modifiers |= kModifierFtz;
  if (lowering.has("sat")) modifiers |= kModifierSat;
  if (lowering.has("relu")) modifiers |= kModifierRelu;
  if (lowering.has("NaN")) modifiers |= kModifierNan;
  if (lowering.has("xorsign")) modifiers |= kModifierXorSign;
  if (lowering.has("abs")) modifiers |= kModifierAbs;
  return modifiers;
}

Rounding rounding_of(Lowering& lowering) {
  static const std::pair<const char*, Rounding> names[] = {
      {"rn", kRoundNearest},  {"rz", kRoundZero},         {"rm", kRoundDown},
      {"rp", kRoundUp},       {"rna", kRoundNearestAway}, {"rni", kRoundNearestInt},
      {"rzi", kRoundZeroInt}, {"rmi", kRoundDownInt},     {"rpi", kRoundUpInt}};
  for (auto& entry : names)
    if (lowering.has(entry.first)) return entry.second;
  return kRoundNone;
}

bool is_half(Type type) {
  return type == kF16 || type == kBf16 || type == kF16x2 || type == kBf16x2;
}

void emit_simple(Lowering& lowering, Handler handler, InstructionClass instruction_class,
                 Type destination_type, const std::vector<Type>& source_types) {
  const Statement& statement = *lowering.current;
  if (!handler) lowering.unsupported();
  if (statement.operands.size() != source_types.size() + 1)
    lowering.fail("wrong number of operands");
  std::vector<i32> ids;
  size_t k = 1;
  for (Type type : source_types) ids.push_back(lowering.source(statement.operands[k++], type));
  ids.insert(ids.begin(), lowering.destination(statement.operands[0], destination_type));
  lowering.emit(handler, instruction_class, ids, 1);
}

static bool is_float(Type type) { return type == kF32 || type == kF64 || type == kF32x2; }

static void lower_add(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  bool subtract = statement.name()[0] == 's';
  if (is_half(type)) {
    lower_half(lowering, statement, type, subtract ? kHalfSub : kHalfAdd, 2);
  } else if (is_float(type)) {
    if (lowering.types().size() > 1) lowering.unsupported();
    lower_float(lowering, statement, type, subtract ? kFloatSub : kFloatAdd);
  } else {
    lower_integer_add(lowering, statement, type);
  }
}

static void lower_mul(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  if (is_half(type))
    lower_half(lowering, statement, type, kHalfMul, 2);
  else if (is_float(type))
    lower_float(lowering, statement, type, kFloatMul);
  else
    lower_integer_mul(lowering, statement, type);
}

static void lower_mad(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  if (is_half(type))
    lower_half(lowering, statement, type, kHalfFma, 3);
  else if (is_float(type))
    lower_float(lowering, statement, type, kFloatFma);
  else
    lower_integer_mad(lowering, statement, type);
}

static void lower_div(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  if (type == kF32 && (statement.has("approx") || statement.has("full")))
    lower_float_div_approx(lowering, type);
  else if (type == kF32 || type == kF64)
    lower_float(lowering, statement, type, kFloatDiv);
  else
    lower_integer_div(lowering, statement, type);
}

static void lower_min(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  bool maximum = statement.name() == "max";
  if (is_half(type))
    lower_half(lowering, statement, type, maximum ? kHalfMax : kHalfMin, 2);
  else if (type == kF32 || type == kF64)
    lower_float_min(lowering, statement, type);
  else
    lower_integer_min(lowering, statement, type);
}

static void lower_abs(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  bool absolute_value = statement.name() == "abs";
  if (is_half(type))
    lower_half(lowering, statement, type, absolute_value ? kHalfAbs : kHalfNeg, 1);
  else if (type == kF32 || type == kF64)
    lower_float_abs(lowering, statement, type);
  else
    lower_integer_abs(lowering, statement, type);
}

static const Opcodes kOpcodes{
    {"add", lower_add}, {"sub", lower_add},   {"addc", lower_add}, {"subc", lower_add},
    {"mul", lower_mul}, {"mul24", lower_mul}, {"mad", lower_mad},  {"madc", lower_mad},
    {"fma", lower_mad}, {"mad24", lower_mad}, {"div", lower_div},  {"rem", lower_div},
    {"min", lower_min}, {"max", lower_min},   {"abs", lower_abs},  {"neg", lower_abs}};
}  // namespace ptxsim
