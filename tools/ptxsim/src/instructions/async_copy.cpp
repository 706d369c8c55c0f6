// cp.async without bulk: queued until the group is waited for.

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
static void execute_cp_async(
    Warp& warp, const Instruction& instruction,
    u32 lanes) {  // o: dst, src, srcsize, ignore-pred; imm: size; imm2 bit0: src-size given
  u64 d[32], s[32];
  {
    const Instruction& J = instruction;
    if (J.modifiers & 1) {
      const u64* b = warp.source<u64>(instruction.operands[0]);
      for (int i = 0; i < 32; i++) d[i] = b[i] + (u64)instruction.offset;
    } else {
      const u32* b = warp.source<u32>(instruction.operands[0]);
      for (int i = 0; i < 32; i++) d[i] = (u32)(b[i] + (u32)instruction.offset);
    }
  }
  const u64* sb = warp.source<u64>(instruction.operands[1]);
  i64 so = (i64)(u64)instruction.aux;
  for (int i = 0; i < 32; i++) s[i] = sb[i] + (u64)so;
  const u32* ss = warp.source<u32>(instruction.operands[2]);
  u32 ign = read_predicate(warp, instruction.operands[3]);
  if (warp.launch->stats_on) {
    u32 act = 0;
    for_each_lane(lanes, [&](int lane) {
      if (!((ign >> lane) & 1) && (!(instruction.imm2 & 1) || ss[lane])) act |= 1u << lane;
    });
    if (act) count_global(warp, s, act, instruction.imm, false);
    count_shared(warp, d, lanes, instruction.imm);
    warp.worker->stats.cp_async_bytes += (u64)instruction.imm * (u64)__builtin_popcount(lanes);
  }
  for_each_lane(lanes, [&](int lane) {
    u32 src = (instruction.imm2 & 1) ? ss[lane] : instruction.imm;
    if ((ign >> lane) & 1) src = 0;
    if (src > instruction.imm)
      warp.fail(kErrorLaunch, lane,
                format("cp.async src-size %u exceeds cp-size %u", src, instruction.imm));
    if (s[lane] & (instruction.imm - 1)) misaligned(warp, lane, kGlobal, s[lane], instruction.imm);
    if (src) {
      if (warp.launch->check_init || src != instruction.imm) {
        for (u32 k = 0; k < src; k++) global_pointer(warp, lane, s[lane] + k, 1, kRead);
      } else
        global_pointer(warp, lane, s[lane], instruction.imm, kRead);
    }
    u32 da = (Space)instruction.space == kShared ? (u32)d[lane]
                                                 : shared_address(warp, lane, kGeneric, d[lane]);
    if (warp.launch->check_init || warp.launch->check_race)
      shared_pointer(warp, lane, da, instruction.imm, kWrite);
    else
      shared_pointer(warp, lane, da, instruction.imm, kAtomic);
    AsyncCopy op;
    op.lane = (u8)lane;
    op.size = (u8)instruction.imm;
    op.source_bytes = (u8)src;
    op.ignore = false;
    op.group = warp.async_copy_group[lane];
    op.destination = da;
    op.source = s[lane];
    op.pc = instruction.line;
    warp.async_copies.push_back(op);
  });
}
void finish_async_copies(
    Warp& warp, u32 lanes, u32 keep,
    bool all) {  // completes all but the newest `keep` committed groups of each lane
  size_t kept = 0;
  for (size_t i = 0; i < warp.async_copies.size(); i++) {
    AsyncCopy& copy = warp.async_copies[i];
    bool due =
        ((lanes >> copy.lane) & 1) && (all || copy.group + keep < warp.async_copy_group[copy.lane]);
    if (due) {
      u32 offset = copy.destination & 0xffffff;
      Cta* cta = (copy.destination >> 24) ? cta_of(warp, copy.lane, copy.destination) : warp.cta;
      if (copy.source_bytes)
        memcpy(cta->shared + offset, (const void*)copy.source, copy.source_bytes);
      if (copy.source_bytes < copy.size)
        memset(cta->shared + offset + copy.source_bytes, 0, copy.size - copy.source_bytes);
      if (warp.launch->check_init)
        for (u32 k = 0; k < copy.source_bytes; k++)
          init_set(*cta, offset + k, 1, shadow_state(warp, copy.lane, kGlobal, copy.source + k));
    } else
      warp.async_copies[kept++] = copy;
  }
  warp.async_copies.resize(kept);
}
static void execute_cp_commit(Warp& warp, const Instruction& instruction, u32 lanes) {
  for_each_lane(lanes, [&](int lane) { warp.async_copy_group[lane]++; });
}
static void execute_cp_wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  finish_async_copies(warp, lanes, instruction.imm, instruction.imm2);
}

static void lower_cp_async(Lowering& lowering, const Statement& statement) {
  if (statement.has("commit_group")) {
    lowering.emit(execute_cp_commit, kClassCpAsync, {}, 0);
    return;
  }
  if (statement.has("wait_all")) {
    lowering.emit(execute_cp_wait, kClassCpAsync, {}, 0).imm2 = 1;
    return;
  }
  if (statement.has("wait_group")) {
    if (statement.operands[0].kind != Operand::kInteger) lowering.fail("immediate expected");
    lowering.emit(execute_cp_wait, kClassCpAsync, {}, 0).imm = (u32)statement.operands[0].bits;
    return;
  }
  i64 doff, soff;
  Space space = statement.has("shared") || statement.has("shared::cta") ? kShared : kGeneric;
  i32 d = lowering.address_base(statement.operands[0], space, doff),
      a = lowering.address_base(statement.operands[1], kGlobal, soff);
  if (lowering.slot_of(a) != 8) lowering.fail("64-bit global address expected");
  if (statement.operands[2].kind != Operand::kInteger)
    lowering.fail("cp-size must be an immediate");
  u32 sz = (u32)statement.operands[2].bits;
  if (sz != 4 && sz != 8 && sz != 16) lowering.fail("cp-size must be 4, 8 or 16");
  size_t n = statement.operands.size();
  if (statement.has("L2::cache_hint")) n--;
  i32 ss = lowering.constant(sz, 4), ig = lowering.constant_predicate(false);
  u32 has = 0;
  if (n > 3) {
    const Operand& operand = statement.operands[3];
    if (operand.kind == Operand::kRegister &&
        lowering.registers[lowering.register_id(operand)].is_predicate)
      ig = lowering.predicate_source(operand);
    else {
      ss = lowering.source(operand, kU32);
      has = 1;
    }
  }
  Instruction& instruction = lowering.emit(execute_cp_async, kClassCpAsync, {d, a, ss, ig}, 0);
  set_address_operand(lowering, instruction, d, doff);
  instruction.aux = (const void*)soff;
  instruction.space = space;
  instruction.imm = sz;
  instruction.imm2 = has;
}

static const Opcodes kOpcodes{{"cp.async", lower_cp_async}};
}  // namespace ptxsim
