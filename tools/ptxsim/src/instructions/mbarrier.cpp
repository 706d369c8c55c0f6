#include "instructions/mbarrier.h"

#include "checks.h"
#include "lower/lowering.h"
#include "lower/opcodes.h"

namespace ptxsim {
void finish_async_copies(Warp& warp, u32 lanes, u32 keep, bool all);

static u8* mbarrier_pointer(Warp& warp, int lane, u32 address, Cta** owner) {
  u32 offset = address & 0xffffff;
  Cta* cta = (address >> 24) ? cta_of(warp, lane, address) : warp.cta;
  if (offset & 7)
    warp.fail(kErrorMisaligned, lane,
              format("mbarrier at shared address 0x%x is not 8-byte aligned", address));
  if (offset < cta->shared_begin || offset + 8 > cta->shared_end)
    warp.fail(
        kErrorAddress, lane,
        format("mbarrier at shared address 0x%x lies outside the CTA's shared memory (0x%x..0x%x)",
               address, cta->shared_begin, cta->shared_end));
  if (owner) *owner = cta;
  return cta->shared + offset;
}
Mbarrier mbarrier_get(Warp& warp, int lane, u32 address, Cta** owner) {
  Mbarrier barrier;
  memcpy(&barrier.bits, mbarrier_pointer(warp, lane, address, owner), 8);
  if (!barrier.valid())
    warp.fail(kErrorLaunch, lane,
              format("mbarrier at shared address 0x%x is not initialized (contents 0x%016llx)",
                     address, (unsigned long long)barrier.bits));
  return barrier;
}
static void mbarrier_put(Warp& warp, int lane, u32 address, Mbarrier barrier) {
  u32 pending = barrier.pending(), expected = barrier.expected(), phase = barrier.phase();
  i32 bytes = barrier.pending_bytes();
  if (pending == 0 && bytes == 0) {
    phase ^= 1;
    pending = expected;
    barrier.set(pending, expected, bytes, phase);
  }
  memcpy(mbarrier_pointer(warp, lane, address, nullptr), &barrier.bits, 8);
  warp.cta->cluster->progress++;
}
void mbarrier_complete_bytes(Warp& warp, int lane, u32 address, i32 delta) {
  Mbarrier barrier = mbarrier_get(warp, lane, address);
  i32 bytes = barrier.pending_bytes() + delta;
  if (bytes > 0xfffff || bytes < -0xfffff)
    warp.fail(kErrorLaunch, lane,
              format("mbarrier 0x%x: transaction count %d out of range", address, bytes));
  barrier.set(barrier.pending(), barrier.expected(), bytes, barrier.phase());
  mbarrier_put(warp, lane, address, barrier);
}

enum {
  kMbarrierInit,
  kMbarrierInval,
  kMbarrierArrive,
  kMbarrierArriveTx,
  kMbarrierDrop,
  kMbarrierDropTx,
  kMbarrierExpect,
  kMbarrierComplete,
  kMbarrierCpAsync,
  kMbarrierCpAsyncNoinc
};

static void initialize(Warp& warp, int lane, u32 address, u32 count) {
  Cta* cta = nullptr;
  u8* memory = mbarrier_pointer(warp, lane, address, &cta);
  if (count < 1 || count > 0xfffff)
    warp.fail(kErrorLaunch, lane, format("mbarrier.init with arrival count %u", count));
  Mbarrier barrier;
  barrier.set(count, count, 0, 0);
  memcpy(memory, &barrier.bits, 8);
  if (cta->shadow && warp.launch->check_init) init_write(*cta, address & 0xffffff, 8);
  warp.cta->cluster->progress++;
}

static void invalidate(Warp& warp, int lane, u32 address) {
  mbarrier_get(warp, lane, address);
  memset(mbarrier_pointer(warp, lane, address, nullptr), 0xff, 8);
}

// Returns the state before the arrival.
static u64 arrive(Warp& warp, int lane, u32 address, u32 kind, u32 count) {
  Cta* cta = nullptr;
  Mbarrier barrier = mbarrier_get(warp, lane, address, &cta);
  u64 before = barrier.bits;
  u32 arrivals = kind == kMbarrierArrive || kind == kMbarrierDrop ? count : 1;
  i32 bytes = barrier.pending_bytes();
  if (kind == kMbarrierArriveTx || kind == kMbarrierDropTx) bytes += (i32)count;
  u32 expected = barrier.expected();
  if (arrivals > barrier.pending())
    warp.fail(kErrorLaunch, lane,
              format("mbarrier 0x%x: %u arrivals but only %u are pending in this phase (expected "
                     "count %u)",
                     address, arrivals, barrier.pending(), expected));
  if (kind == kMbarrierDrop || kind == kMbarrierDropTx) expected -= arrivals;
  barrier.set(barrier.pending() - arrivals, expected, bytes, barrier.phase());
  if (warp.launch->check_race) clock_release(warp, mbarrier_clock(*cta, address & 0xffffff));
  mbarrier_put(warp, lane, address, barrier);
  return before;
}

// Operands: state, address, count; imm: kind; imm2: whether the state is stored.
static void execute_mbar(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* state = warp.destination<u64>(instruction.operands[0]);
  const u32* count = warp.source<u32>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    u32 address = shared_operand(warp, instruction, instruction.operands[1],
                                 instruction.modifiers & 1, instruction.offset, lane);
    switch (instruction.imm) {
      case kMbarrierInit:
        initialize(warp, lane, address, count[lane]);
        break;
      case kMbarrierInval:
        invalidate(warp, lane, address);
        break;
      case kMbarrierExpect:
        mbarrier_complete_bytes(warp, lane, address, (i32)count[lane]);
        break;
      case kMbarrierComplete:
        mbarrier_complete_bytes(warp, lane, address, -(i32)count[lane]);
        break;
      case kMbarrierCpAsync:  // increments and decrements the pending count: no net effect
        finish_async_copies(warp, 1u << lane, 0, true);
        break;
      default: {
        if (instruction.imm == kMbarrierCpAsyncNoinc)
          finish_async_copies(warp, 1u << lane, 0, true);
        u64 before = arrive(warp, lane, address, instruction.imm, count[lane]);
        if (instruction.imm2) state[lane] = before;
        break;
      }
    }
  });
}

// o: pred, addr, state/parity; imm: 1 parity
static void execute_mb_wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 completed = 0;
  for_each_lane(lanes, [&](int lane) {
    u32 address = shared_operand(warp, instruction, instruction.operands[1],
                                 instruction.modifiers & 1, instruction.offset, lane);
    Cta* owner;
    Mbarrier barrier = mbarrier_get(warp, lane, address, &owner);
    bool done;
    if (instruction.imm)
      done = barrier.phase() != (warp.source<u32>(instruction.operands[2])[lane] & 1);
    else {
      Mbarrier earlier;
      earlier.bits = warp.source<u64>(instruction.operands[2])[lane];
      done = barrier.phase() != earlier.phase();
    }
    completed |= (u32)done << lane;
    if (done && warp.launch->check_race) {
      clock_acquire(warp, mbarrier_clock(*owner, address & 0xffffff));
    }
  });
  write_predicate(warp, instruction.operands[0], completed, lanes);
  if (completed != lanes) warp.failed_wait = true;
}
static void execute_mb_pending(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u64* state = warp.source<u64>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)(state[lane] & 0xfffff); });
}

static void set_address(Lowering& lowering, Instruction& instruction, i32 address, i64 offset,
                        Space space) {
  instruction.offset = offset;
  instruction.modifiers = lowering.slot_of(address) == 8;
  instruction.space = space;
}

static void lower_pending_count(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_mbarrier = true;
  i32 a = lowering.source(statement.operands[1], kB64);
  lowering.emit(execute_mb_pending, kClassMbarrier,
                {lowering.destination(statement.operands[0], kU32), a}, 1);
}

static void lower_mbarrier_wait(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_mbarrier = true;
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 offset;
  bool by_parity = statement.has("parity");
  i32 address = lowering.address_base(statement.operands[1], space, offset),
      awaited = lowering.source(statement.operands[2], by_parity ? kU32 : kB64);
  if (statement.operands.size() > 3) lowering.source(statement.operands[3], kU32);
  Instruction& instruction =
      lowering.emit(execute_mb_wait, kClassMbarrier,
                    {lowering.predicate_destination(statement.operands[0]), address, awaited}, 1);
  set_address(lowering, instruction, address, offset, space);
  instruction.imm = by_parity;
  instruction.control = kTryWait;
}

static void lower_mbarrier(Lowering& lowering, const Statement& statement) {
  const std::string& operation = statement.opcode[1];
  lowering.kernel.uses_mbarrier = true;
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 offset;
  int kind;
  size_t memory = 0;
  i32 count = lowering.constant(1, 4), state = -1;
  if (operation == "init") {
    kind = kMbarrierInit;
    count = lowering.source(statement.operands[1], kU32);
  } else if (operation == "inval")
    kind = kMbarrierInval;
  else if (operation == "expect_tx") {
    kind = kMbarrierExpect;
    count = lowering.source(statement.operands[1], kU32);
  } else if (operation == "complete_tx") {
    kind = kMbarrierComplete;
    count = lowering.source(statement.operands[1], kU32);
  } else if (operation == "arrive" || operation == "arrive_drop") {
    bool expects_bytes = statement.has("expect_tx"), drops = operation == "arrive_drop";
    kind = drops ? (expects_bytes ? kMbarrierDropTx : kMbarrierDrop)
                 : (expects_bytes ? kMbarrierArriveTx : kMbarrierArrive);
    if (statement.operands[0].kind != Operand::kMemory) memory = 1;
    if (statement.operands.size() > memory + 1)
      count = lowering.source(statement.operands[memory + 1], kU32);
  } else
    lowering.unsupported();
  i32 address = lowering.address_base(statement.operands[memory], space, offset);
  bool has_state = memory == 1 && statement.operands[0].kind != Operand::kSink;
  state = has_state ? lowering.destination(statement.operands[0], kB64) : lowering.temporary(8);
  Instruction& instruction =
      lowering.emit(execute_mbar, kClassMbarrier, {state, address, count}, 1);
  set_address(lowering, instruction, address, offset, space);
  instruction.imm = (u32)kind;
  instruction.imm2 = has_state;
}

static void lower_cp_async_arrive(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_mbarrier = true;
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 offset;
  i32 address = lowering.address_base(statement.operands[0], space, offset);
  Instruction& instruction = lowering.emit(
      execute_mbar, kClassMbarrier, {lowering.temporary(8), address, lowering.constant(1, 4)}, 1);
  set_address(lowering, instruction, address, offset, space);
  instruction.imm = statement.has("noinc") ? kMbarrierCpAsyncNoinc : kMbarrierCpAsync;
  instruction.imm2 = 0;
}

static const Opcodes kOpcodes{{"mbarrier", lower_mbarrier},
                              {"mbarrier.pending_count", lower_pending_count},
                              {"mbarrier.test_wait", lower_mbarrier_wait},
                              {"mbarrier.try_wait", lower_mbarrier_wait},
                              {"cp.async.mbarrier", lower_cp_async_arrive}};
}  // namespace ptxsim
