// Address spaces and addresses in a cluster: isspacep, cvta, mapa, getctarank.
#include "instructions/handlers.h"

namespace ptxsim {
static void execute_isspacep(Warp& warp, const Instruction& instruction, u32 lanes) {
  const u64* a = warp.source<u64>(instruction.operands[1]);
  u32 result = 0;
  for_each_lane(lanes, [&](int lane) {
    bool inside = false;
    u64 address = a[lane];
    switch (instruction.imm) {
      case 0:
        inside = !in_shared(address) && !in_local(address);
        break;
      case 1: {
        u32 rank_plus_one = ((u32)address >> 24);
        inside = in_shared(address) && (rank_plus_one == 0 || rank_plus_one == warp.cta->rank + 1);
        break;
      }
      case 2:
        inside = in_shared(address);
        break;
      case 3:
        inside = in_local(address);
        break;
      case 4:
        inside = address >= warp.launch->param_base &&
                 address < warp.launch->param_base + warp.launch->param_size;
        break;
      default:
        inside = false;
        break;
    }
    result |= (u32)inside << lane;
  });
  write_predicate(warp, instruction.operands[0], result, lanes);
}
// imm: 0 identity, 1 shared->generic, 2 local->generic, 3 param->generic, 4 generic->shared/local,
// 5 generic->param; imm2: source slot, ty: dest slot
static void execute_cvta(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void* a = warp.source(instruction.operands[1]);
  void* destination = warp.destination(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u64 address = instruction.imm2 == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane];
    u64 result = address;
    switch (instruction.imm) {
      case 1:
        result = kSharedWin | (u32)address;
        break;
      case 2:
        result = kLocalWin | (u32)address;
        break;
      case 3:
        result = (address & 0x80000000u) ? kLocalWin | (u32)(address & 0x7fffffff)
                                         : warp.launch->param_base + address;
        break;
      case 4:
        result = (u32)address;
        break;
      case 5:
        result = address - warp.launch->param_base;
        break;
    }
    if (instruction.type == 8)
      ((u64*)destination)[lane] = result;
    else
      ((u32*)destination)[lane] = (u32)result;
  });
}

static void lower_isspacep(Lowering& lowering, const Statement& statement) {
  u32 kind = statement.has("global")                                   ? 0
             : statement.has("shared::cluster")                        ? 2
             : statement.has("shared") || statement.has("shared::cta") ? 1
             : statement.has("local")                                  ? 3
             : statement.has("param") || statement.has("param::entry") ? 4
                                                                       : 5;
  i32 a = lowering.source(statement.operands[1], kB64);
  lowering
      .emit(execute_isspacep, kClassPredicate,
            {lowering.predicate_destination(statement.operands[0]), a}, 1)
      .imm = kind;
}

static void lower_cvta(Lowering& lowering, const Statement& statement) {
  Space space = lowering.space();
  bool to = statement.has("to");
  u32 kind = 0;
  if (space == kShared)
    kind = to ? 4 : 1;
  else if (space == kLocal)
    kind = to ? 4 : 2;
  else if (space == kParam)
    kind = to ? 5 : 3;
  Type type = lowering.last_type();
  Operand a = statement.operands[1];
  if (a.kind == Operand::kSymbol) {
    Space symbol_space;
    u64 address;
    if (lowering.symbol_address(a.symbol, symbol_space, address) && space == kParam &&
        symbol_space == kLocal)
      kind = 2;
  }
  i32 source = lowering.source(a, type);
  Instruction& instruction = lowering.emit(
      execute_cvta, kClassInteger, {lowering.destination(statement.operands[0], type), source}, 1);
  instruction.imm = kind;
  instruction.imm2 = (u32)type_bytes(type);
  instruction.type = (u8)type_bytes(type);
}

// imm: 0 shared::cluster address, 1 generic; type: bytes of a's register, type2: of the result's.
static void execute_mapa(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void* a = warp.source(instruction.operands[1]);
  const u32* ranks = warp.source<u32>(instruction.operands[2]);
  void* destination = warp.destination(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u64 address = instruction.type == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane];
    if (ranks[lane] >= warp.cta->cluster->ctas.size())
      warp.fail(kErrorLaunch, lane,
                format("mapa: CTA rank %u in a cluster of %zu", ranks[lane],
                       warp.cta->cluster->ctas.size()));
    u32 shared = instruction.imm ? shared_address(warp, lane, kGeneric, address) : (u32)address;
    u32 mapped = ((ranks[lane] + 1) << 24) | (shared & 0xffffff);
    u64 result = instruction.imm ? kSharedWin | mapped : mapped;
    if (instruction.type2 == 8)
      ((u64*)destination)[lane] = result;
    else
      ((u32*)destination)[lane] = (u32)result;
  });
}
static void execute_get_rank(Warp& warp, const Instruction& instruction, u32 lanes) {
  const void* a = warp.source(instruction.operands[1]);
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) {
    u32 address = (u32)(instruction.type == 8 ? ((const u64*)a)[lane] : ((const u32*)a)[lane]);
    destination[lane] = (address >> 24) ? (address >> 24) - 1 : warp.cta->rank;
  });
}

static void lower_mapa(Lowering& lowering, const Statement& statement) {
  bool is_generic = lowering.space() == kGeneric;
  Type type = lowering.last_type();
  i32 a = statement.operands[1].kind == Operand::kRegister
              ? lowering.register_id(statement.operands[1])
              : lowering.source(statement.operands[1], type);
  i32 rank = lowering.source(statement.operands[2], kU32);
  Instruction& instruction = lowering.emit(
      execute_mapa, kClassInteger, {lowering.destination(statement.operands[0], type), a, rank}, 1);
  instruction.imm = is_generic;
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
