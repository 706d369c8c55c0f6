// Address spaces and addresses in a cluster: isspacep, cvta, mapa, getctarank.
#include "instructions/handlers.h"

namespace ptxsim {
static void execute_isspacep(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u64* a = warp.source<u64>(instruction.operands[1]);
  u32 r = 0;
  for_each_lane(lanes, [&](int lane) {
    bool v = false;
    u64 x = a[lane];
    switch (instruction.imm) {
      case 0:
        v = !in_shared(x) && !in_local(x);
        break;
      case 1: {
        u32 rk = ((u32)x >> 24);
        v = in_shared(x) && (rk == 0 || rk == warp.cta->rank + 1);
        break;
      }
      case 2:
        v = in_shared(x);
        break;
      case 3:
        v = in_local(x);
        break;
      case 4:
        v = x >= warp.launch->param_base && x < warp.launch->param_base + warp.launch->param_size;
        break;
      default:
        v = false;
        break;
    }
    r |= (u32)v << lane;
  });
  write_predicate(warp, instruction.operands[0], r, lanes);
}
// imm: 0 identity, 1 shared->generic, 2 local->generic, 3 param->generic, 4 generic->shared/local,
// 5 generic->param; imm2: source slot, ty: dest slot
static void execute_cvta(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void* a = warp.source(instruction.operands[1]);
  void* destination = warp.destination(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u64 x = instruction.imm2 == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane];
    u64 r = x;
    switch (instruction.imm) {
      case 1:
        r = kSharedWin | (u32)x;
        break;
      case 2:
        r = kLocalWin | (u32)x;
        break;
      case 3:
        r = (x & 0x80000000u) ? kLocalWin | (u32)(x & 0x7fffffff) : warp.launch->param_base + x;
        break;
      case 4:
        r = (u32)x;
        break;
      case 5:
        r = x - warp.launch->param_base;
        break;
    }
    if (instruction.type == 8)
      ((u64*)destination)[lane] = r;
    else
      ((u32*)destination)[lane] = (u32)r;
  });
}

static void lower_isspacep(Lowering& lowering, const Statement& statement) {
  u32 k = statement.has("global")                                   ? 0
          : statement.has("shared::cluster")                        ? 2
          : statement.has("shared") || statement.has("shared::cta") ? 1
          : statement.has("local")                                  ? 3
          : statement.has("param") || statement.has("param::entry") ? 4
                                                                    : 5;
  i32 a = lowering.source(statement.operands[1], kB64);
  lowering
      .emit(execute_isspacep, kClassPredicate,
            {lowering.predicate_destination(statement.operands[0]), a}, 1)
      .imm = k;
}

static void lower_cvta(Lowering& lowering, const Statement& statement) {
  Space space = lowering.space();
  bool to = statement.has("to");
  u32 k = 0;
  if (space == kShared)
    k = to ? 4 : 1;
  else if (space == kLocal)
    k = to ? 4 : 2;
  else if (space == kParam)
    k = to ? 5 : 3;
  Type type = lowering.last_type();
  Operand a = statement.operands[1];
  if (a.kind == Operand::kSymbol) {
    Space vs;
    u64 ad;
    if (lowering.symbol_address(a.symbol, vs, ad) && space == kParam && vs == kLocal) k = 2;
  }
  i32 x = lowering.source(a, type);
  Instruction& instruction = lowering.emit(
      execute_cvta, kClassInteger, {lowering.destination(statement.operands[0], type), x}, 1);
  instruction.imm = k;
  instruction.imm2 = (u32)type_bytes(type);
  instruction.type = (u8)type_bytes(type);
}

static void execute_mapa(
    Warp& warp, const Instruction& instruction,
    u32 lanes) {  // imm: 0 shared::cluster address, 1 generic; ty slot of a; ty2 slot of d
  const void* a = warp.source(instruction.operands[1]);
  const u32* r = warp.source<u32>(instruction.operands[2]);
  void* destination = warp.destination(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u64 x = instruction.type == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane];
    if (r[lane] >= warp.cta->cluster->ctas.size())
      warp.fail(
          kErrorLaunch, lane,
          format("mapa: CTA rank %u in a cluster of %zu", r[lane], warp.cta->cluster->ctas.size()));
    u32 sa = instruction.imm ? shared_address(warp, lane, kGeneric, x) : (u32)x;
    u32 q = ((r[lane] + 1) << 24) | (sa & 0xffffff);
    u64 v = instruction.imm ? kSharedWin | q : q;
    if (instruction.type2 == 8)
      ((u64*)destination)[lane] = v;
    else
      ((u32*)destination)[lane] = (u32)v;
  });
}
static void execute_get_rank(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void* a = warp.source(instruction.operands[1]);
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u32 x = (u32)(instruction.type == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane]);
    destination[lane] = (x >> 24) ? (x >> 24) - 1 : warp.cta->rank;
  });
}

static void lower_mapa(Lowering& lowering, const Statement& statement) {
  bool gen = lowering.space() == kGeneric;
  Type type = lowering.last_type();
  i32 a = statement.operands[1].kind == Operand::kRegister
              ? lowering.register_id(statement.operands[1])
              : lowering.source(statement.operands[1], type);
  i32 r = lowering.source(statement.operands[2], kU32);
  Instruction& instruction = lowering.emit(
      execute_mapa, kClassInteger, {lowering.destination(statement.operands[0], type), a, r}, 1);
  instruction.imm = gen;
  instruction.type = lowering.slot_of(a);
  instruction.type2 = (u8)type_bytes(type);
  lowering.kernel.uses_cluster = true;
}

static void lower_getctarank(Lowering& lowering, const Statement& statement) {
  i32 a = statement.operands[1].kind == Operand::kRegister
              ? lowering.register_id(statement.operands[1])
              : lowering.source(statement.operands[1], kU64);
  Instruction& instruction = lowering.emit(
      execute_get_rank, kClassInteger, {lowering.destination(statement.operands[0], kU32), a}, 1);
  instruction.type = lowering.slot_of(a);
}

static const Opcodes kOpcodes{{"isspacep", lower_isspacep},
                              {"cvta", lower_cvta},
                              {"mapa", lower_mapa},
                              {"getctarank", lower_getctarank}};
}  // namespace ptxsim
