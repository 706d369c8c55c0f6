// Barriers of warps, CTAs and clusters, and what only passes time.
#include "instructions/moves.h"
#include "lower/lowering.h"
#include "lower/opcodes.h"

namespace ptxsim {
static void execute_trap(Warp& warp, const Instruction&, u32 lanes) {
  warp.fail(kErrorTrap, __builtin_ctz(lanes), "trap instruction executed");
}

static void lower_warp_barrier(Lowering& lowering, const Statement& statement) {
  i32 member_mask = lowering.source(statement.operands[0], kB32);
  Instruction& instruction = lowering.emit(execute_nop, kClassWarp, {member_mask}, 0);
  instruction.control = kWarpSync;
  instruction.imm2 = 0;
}

static void lower_cluster_barrier(Lowering& lowering, const Statement& statement) {
  Instruction& instruction = lowering.emit(execute_nop, kClassBarrier, {}, 0);
  instruction.control = statement.has("arrive") ? kClusterArrive : kClusterWait;
  instruction.aligned = statement.has("aligned");
  lowering.kernel.uses_cluster = true;
}

// Operands: id, count, [p, c | d, c]; imm: 0 sync 1 arrive 2 red; imm2: 0 popc 1 and 2 or.
static void lower_barrier(Lowering& lowering, const Statement& statement) {
  bool red = statement.has("red");
  size_t k = red ? 1 : 0;
  if (statement.operands.size() <= k) lowering.fail("barrier operand missing");
  i32 id = lowering.source(statement.operands[k++], kU32), count = lowering.constant(0, 4), c = -1,
      d = -1;
  size_t rest = statement.operands.size() - k;
  if (rest > (red ? 1u : 0u)) count = lowering.source(statement.operands[k++], kU32);
  u32 reduction = 0;
  if (red) {
    c = lowering.predicate_source(statement.operands[k]);
    reduction = statement.has("popc") ? 0 : statement.has("and") ? 1 : 2;
    d = reduction == 0 ? lowering.destination(statement.operands[0], kU32)
                       : lowering.predicate_destination(statement.operands[0]);
  }
  Instruction& instruction = red ? lowering.emit(execute_nop, kClassBarrier, {d, id, count, c}, 1)
                                 : lowering.emit(execute_nop, kClassBarrier, {id, count}, 0);
  instruction.control = kBarrier;
  instruction.aligned = statement.name() == "bar" || statement.has("aligned");
  instruction.imm = red ? 2 : statement.has("arrive") ? 1 : 0;
  instruction.imm2 = reduction;
}

static void lower_nanosleep(Lowering& lowering, const Statement& statement) {
  lowering.source(statement.operands[0], kU32);
  lowering.emit(execute_nop, kClassOther, {}, 0).control = kYield;
}

static void lower_trap(Lowering& lowering, const Statement&) {
  lowering.emit(execute_trap, kClassControl, {}, 0);
}

static void execute_launch_dependents(Warp& warp, const Instruction&, u32 lanes) {
  if (lanes & ~warp.grid_waited) warp.launch->triggered_early = true;
}

static void lower_grid_dependency(Lowering& lowering, const Statement& statement) {
  bool waits = statement.has("wait");
  Instruction& instruction =
      lowering.emit(waits ? execute_nop : execute_launch_dependents, kClassControl, {}, 0);
  if (waits) instruction.control = kGridWait;
}

static void lower_nothing(Lowering& lowering, const Statement&) {
  lowering.emit(execute_nop, kClassControl, {}, 0);
}

static const Opcodes kOpcodes{{"bar.warp", lower_warp_barrier},
                              {"barrier.warp", lower_warp_barrier},
                              {"barrier.cluster", lower_cluster_barrier},
                              {"bar", lower_barrier},
                              {"barrier", lower_barrier},
                              {"nanosleep", lower_nanosleep},
                              {"trap", lower_trap},
                              {"brkpt", lower_nothing},
                              {"pmevent", lower_nothing},
                              {"griddepcontrol", lower_grid_dependency},
                              {"setmaxnreg", lower_nothing}};
}  // namespace ptxsim
