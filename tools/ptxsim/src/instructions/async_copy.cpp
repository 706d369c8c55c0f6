// cp.async without bulk: queued until the group is waited for.

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
// Counts a cp.async; bytes_of(lane): what a lane reads.
template <class F>
static void count_copy(Warp& warp, const Instruction& instruction, u32 lanes, const u64* sources,
                       const u64* destinations, F bytes_of) {
  u32 size = instruction.imm, reading = 0;
  for_each_lane(lanes, [&](int lane) { reading |= (u32)(bytes_of(lane) != 0) << lane; });
  if (reading) count_global(warp, sources, reading, size, false);
  count_shared(warp, destinations, lanes, size);
  warp.worker->stats.cp_async_bytes += (u64)size * (u64)__builtin_popcount(lanes);
}

static void check_source(Warp& warp, int lane, u64 source, u32 bytes, u32 size) {
  if (bytes > size)
    warp.fail(kErrorLaunch, lane, format("cp.async src-size %u exceeds cp-size %u", bytes, size));
  if (source & (size - 1)) misaligned(warp, lane, kGlobal, source, size);
  if (bytes == size && !warp.launch->check_init)
    global_pointer(warp, lane, source, size, kRead);
  else
    for (u32 k = 0; k < bytes; k++) global_pointer(warp, lane, source + k, 1, kRead);
}

void finish_async_copies(Warp& warp, u32 lanes, u32 keep, bool all);

// Operands: destination, source, source size, predicate that ignores the source. imm: size, imm2:
// whether the source size was given, aux: offset of the source.
static void execute_cp_async(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64 destinations[32], sources[32];
  lane_addresses(warp, instruction, instruction.operands[0], destinations);
  const u64* base = warp.source<u64>(instruction.operands[1]);
  for (int lane = 0; lane < 32; lane++) sources[lane] = base[lane] + (u64)instruction.aux;
  const u32* source_sizes = warp.source<u32>(instruction.operands[2]);
  u32 size = instruction.imm, ignored = read_predicate(warp, instruction.operands[3]);
  auto bytes_of = [&](int lane) {
    return (ignored >> lane) & 1 ? 0 : instruction.imm2 ? source_sizes[lane] : size;
  };
  if (warp.launch->stats_on) count_copy(warp, instruction, lanes, sources, destinations, bytes_of);
  bool checks = warp.launch->check_init || warp.launch->check_race;
  for_each_lane(lanes, [&](int lane) {
    u32 bytes = bytes_of(lane);
    check_source(warp, lane, sources[lane], bytes, size);
    u32 destination = (Space)instruction.space == kShared
                          ? (u32)destinations[lane]
                          : shared_address(warp, lane, kGeneric, destinations[lane]);
    shared_pointer(warp, lane, destination, size, checks ? kWrite : kAtomic);
    warp.async_copies.push_back({.lane = (u8)lane,
                                 .size = (u8)size,
                                 .source_bytes = (u8)bytes,
                                 .ignore = false,
                                 .group = warp.async_copy_group[lane],
                                 .destination = destination,
                                 .source = sources[lane],
                                 .pc = instruction.line});
  });
  // As early as it can be, so that what it reads before the wait is the old memory.
  if (warp.launch->holding) finish_async_copies(warp, lanes, 0, true);
}

// Completes all but the newest `keep` committed groups of each lane.
void finish_async_copies(Warp& warp, u32 lanes, u32 keep, bool all) {
  size_t kept = 0;
  for (auto& copy : warp.async_copies) {
    bool due =
        ((lanes >> copy.lane) & 1) && (all || copy.group + keep < warp.async_copy_group[copy.lane]);
    if (!due) {
      warp.async_copies[kept++] = copy;
      continue;
    }
    u32 offset = copy.destination & 0xffffff;
    Cta* cta = (copy.destination >> 24) ? cta_of(warp, copy.lane, copy.destination) : warp.cta;
    if (copy.source_bytes)
      memcpy(cta->shared + offset, (const void*)copy.source, copy.source_bytes);
    if (copy.source_bytes < copy.size)
      memset(cta->shared + offset + copy.source_bytes, 0, copy.size - copy.source_bytes);
    if (warp.launch->check_init)
      for (u32 k = 0; k < copy.source_bytes; k++)
        init_set(*cta, offset + k, 1, shadow_state(warp, copy.lane, kGlobal, copy.source + k));
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
  const auto& operands = statement.operands;
  i64 destination_offset, source_offset;
  Space space = statement.has("shared") || statement.has("shared::cta") ? kShared : kGeneric;
  i32 destination = lowering.address_base(operands[0], space, destination_offset),
      source = lowering.address_base(operands[1], kGlobal, source_offset);
  if (lowering.slot_of(source) != 8) lowering.fail("64-bit global address expected");
  if (operands[2].kind != Operand::kInteger) lowering.fail("cp-size must be an immediate");
  u32 size = (u32)operands[2].bits;
  if (size != 4 && size != 8 && size != 16) lowering.fail("cp-size must be 4, 8 or 16");
  i32 source_size = lowering.constant(size, 4), ignored = lowering.constant_predicate(false);
  bool has_source_size = false;
  if (operands.size() > (statement.has("L2::cache_hint") ? 4 : 3)) {
    const Operand& operand = operands[3];
    if (operand.kind == Operand::kRegister &&
        lowering.registers[lowering.register_id(operand)].is_predicate) {
      ignored = lowering.predicate_source(operand);
    } else {
      source_size = lowering.source(operand, kU32);
      has_source_size = true;
    }
  }
  Instruction& instruction = lowering.emit(execute_cp_async, kClassCpAsync,
                                           {destination, source, source_size, ignored}, 0);
  set_address_operand(lowering, instruction, destination, destination_offset);
  instruction.aux = (const void*)source_offset;
  instruction.space = space;
  instruction.imm = size;
  instruction.imm2 = has_source_size;
}

static const Opcodes kOpcodes{{"cp.async", lower_cp_async}};
}  // namespace ptxsim
