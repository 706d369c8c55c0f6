// Templates of handlers, and what the lowering of many instructions shares.
#pragma once
#include "exec.h"
#include "fp.h"
#include "lower/lowering.h"
#include "lower/opcodes.h"

namespace ptxsim {
// Handlers of an operation F on one, two or three operands, lane by lane.
template <class D, class A, auto F>
void unary(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  for_each_lane(lanes,
                [&](int lane) { write_lane<D>(destination, lane, F(read_lane<A>(a, lane))); });
}
template <class D, class A, class B, auto F>
void binary(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane, F(read_lane<A>(a, lane), read_lane<B>(b, lane)));
  });
}
template <class D, class A, class B, class C, auto F>
void ternary(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  const void* c = warp.source(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane,
                  F(read_lane<A>(a, lane), read_lane<B>(b, lane), read_lane<C>(c, lane)));
  });
}
// variants that see the instruction (modifiers)
template <class D, class A, auto F>
void unary_modified(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane, F(instruction, read_lane<A>(a, lane)));
  });
}
template <class D, class A, auto F>
void binary_modified(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(destination, lane, F(instruction, read_lane<A>(a, lane), read_lane<A>(b, lane)));
  });
}
template <class D, class A, auto F>
void ternary_modified(Warp& warp, const Instruction& instruction, u32 lanes) {
  void* destination = warp.destination(instruction.operands[0]);
  const void* a = warp.source(instruction.operands[1]);
  const void* b = warp.source(instruction.operands[2]);
  const void* c = warp.source(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    write_lane<D>(
        destination, lane,
        F(instruction, read_lane<A>(a, lane), read_lane<A>(b, lane), read_lane<A>(c, lane)));
  });
}

// Modifiers of float instructions, and of some packed integer ones.
enum {
  kModifierFtz = 1,
  kModifierSat = 2,
  kModifierRelu = 4,
  kModifierNan = 8,
  kModifierXorSign = 16,
  kModifierAbs = 32
};

u8 float_modifiers(Lowering& lowering);
Rounding rounding_of(Lowering& lowering);
bool is_half(Type type);

// The elements of a vector operand; a scalar is a vector of one.
inline std::vector<Operand> elements_of(const Operand& operand) {
  return operand.kind == Operand::kVector ? operand.elements : std::vector<Operand>{operand};
}

// Emits an instruction with one result and a source operand of each type.
void emit_simple(Lowering& lowering, Handler handler, InstructionClass instruction_class,
                 Type destination_type, const std::vector<Type>& source_types);
}  // namespace ptxsim
