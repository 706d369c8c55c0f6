#include "instructions/mbarrier.h"

#include "checks.h"
#include "lower/lowering.h"
#include "lower/opcodes.h"

namespace ptxsim {
void finish_async_copies(Warp& warp, u32 lanes, u32 keep, bool all);

static u8* mbarrier_pointer(Warp& warp, int lane, u32 a, Cta** ct) {
  u32 off = a & 0xffffff;
  Cta* cta = (a >> 24) ? cta_of(warp, lane, a) : warp.cta;
  if (off & 7)
    warp.fail(kErrorMisaligned, lane,
              format("mbarrier at shared address 0x%x is not 8-byte aligned", a));
  if (off < cta->shared_begin || off + 8 > cta->shared_end)
    warp.fail(
        kErrorAddress, lane,
        format("mbarrier at shared address 0x%x lies outside the CTA's shared memory (0x%x..0x%x)",
               a, cta->shared_begin, cta->shared_end));
  if (ct) *ct = cta;
  return cta->shared + off;
}
Mbarrier mbarrier_get(Warp& warp, int lane, u32 a, Cta** ct) {
  Mbarrier barrier;
  memcpy(&barrier.bits, mbarrier_pointer(warp, lane, a, ct), 8);
  if (!barrier.valid())
    warp.fail(kErrorLaunch, lane,
              format("mbarrier at shared address 0x%x is not initialized (contents 0x%016llx)", a,
                     (unsigned long long)barrier.bits));
  return barrier;
}
static void mbarrier_put(Warp& warp, int lane, u32 a, Mbarrier barrier) {
  u32 p = barrier.pending(), e = barrier.expected(), ph = barrier.phase();
  i32 t = barrier.pending_bytes();
  if (p == 0 && t == 0) {
    ph ^= 1;
    p = e;
    barrier.set(p, e, t, ph);
  }
  memcpy(mbarrier_pointer(warp, lane, a, nullptr), &barrier.bits, 8);
  warp.cta->cluster->progress++;
}
void mbarrier_complete_bytes(Warp& warp, int lane, u32 a, i32 delta) {
  Mbarrier barrier = mbarrier_get(warp, lane, a);
  i32 t = barrier.pending_bytes() + delta;
  if (t > 0xfffff || t < -0xfffff)
    warp.fail(kErrorLaunch, lane, format("mbarrier 0x%x: transaction count %d out of range", a, t));
  barrier.set(barrier.pending(), barrier.expected(), t, barrier.phase());
  mbarrier_put(warp, lane, a, barrier);
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

static void initialize(Warp& warp, int lane, u32 a, u32 count) {
  Cta* cta = nullptr;
  u8* p = mbarrier_pointer(warp, lane, a, &cta);
  if (count < 1 || count > 0xfffff)
    warp.fail(kErrorLaunch, lane, format("mbarrier.init with arrival count %u", count));
  Mbarrier barrier;
  barrier.set(count, count, 0, 0);
  memcpy(p, &barrier.bits, 8);
  if (cta->shadow && warp.launch->check_init) init_write(*cta, a & 0xffffff, 8);
  warp.cta->cluster->progress++;
}

static void invalidate(Warp& warp, int lane, u32 a) {
  mbarrier_get(warp, lane, a);
  memset(mbarrier_pointer(warp, lane, a, nullptr), 0xff, 8);
}

// Returns the state before the arrival.
static u64 arrive(Warp& warp, int lane, u32 a, u32 kind, u32 count) {
  Cta* cta = nullptr;
  Mbarrier barrier = mbarrier_get(warp, lane, a, &cta);
  u64 old = barrier.bits;
  u32 arrivals = kind == kMbarrierArrive || kind == kMbarrierDrop ? count : 1;
  i32 bytes = barrier.pending_bytes();
  if (kind == kMbarrierArriveTx || kind == kMbarrierDropTx) bytes += (i32)count;
  u32 expected = barrier.expected();
  if (arrivals > barrier.pending())
    warp.fail(kErrorLaunch, lane,
              format("mbarrier 0x%x: %u arrivals but only %u are pending in this phase (expected "
                     "count %u)",
                     a, arrivals, barrier.pending(), expected));
  if (kind == kMbarrierDrop || kind == kMbarrierDropTx) expected -= arrivals;
  barrier.set(barrier.pending() - arrivals, expected, bytes, barrier.phase());
  if (warp.launch->check_race) clock_release(warp, mbarrier_clock(*cta, a & 0xffffff));
  mbarrier_put(warp, lane, a, barrier);
  return old;
}

// Operands: state, address, count; imm: kind; imm2: whether the state is stored.
static void execute_mbar(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64* state = warp.destination<u64>(instruction.operands[0]);
  const u32* count = warp.source<u32>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    u32 a = shared_operand(warp, instruction, instruction.operands[1], instruction.modifiers & 1,
                           instruction.offset, lane);
    switch (instruction.imm) {
      case kMbarrierInit:
        initialize(warp, lane, a, count[lane]);
        break;
      case kMbarrierInval:
        invalidate(warp, lane, a);
        break;
      case kMbarrierExpect:
        mbarrier_complete_bytes(warp, lane, a, (i32)count[lane]);
        break;
      case kMbarrierComplete:
        mbarrier_complete_bytes(warp, lane, a, -(i32)count[lane]);
        break;
      case kMbarrierCpAsync:  // increments and decrements the pending count: no net effect
        finish_async_copies(warp, 1u << lane, 0, true);
        break;
      default: {
        if (instruction.imm == kMbarrierCpAsyncNoinc)
          finish_async_copies(warp, 1u << lane, 0, true);
        u64 old = arrive(warp, lane, a, instruction.imm, count[lane]);
        if (instruction.imm2) state[lane] = old;
        break;
      }
    }
  });
}

// o: pred, addr, state/parity; imm: 1 parity
static void execute_mb_wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 r = 0;
  for_each_lane(lanes, [&](int lane) {
    u32 a = shared_operand(warp, instruction, instruction.operands[1], instruction.modifiers & 1,
                           instruction.offset, lane);
    Cta* ct;
    Mbarrier barrier = mbarrier_get(warp, lane, a, &ct);
    bool done;
    if (instruction.imm)
      done = barrier.phase() != (warp.source<u32>(instruction.operands[2])[lane] & 1);
    else {
      Mbarrier s;
      s.bits = warp.source<u64>(instruction.operands[2])[lane];
      done = barrier.phase() != s.phase();
    }
    r |= (u32)done << lane;
    if (done && warp.launch->check_race) {
      clock_acquire(warp, mbarrier_clock(*ct, a & 0xffffff));
    }
  });
  write_predicate(warp, instruction.operands[0], r, lanes);
  if (r != lanes) warp.failed_wait = true;
}
static void execute_mb_pending(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u64* s = warp.source<u64>(instruction.operands[1]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)(s[lane] & 0xfffff); });
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
  i64 off;
  bool par = statement.has("parity");
  i32 a = lowering.address_base(statement.operands[1], space, off),
      v = lowering.source(statement.operands[2], par ? kU32 : kB64);
  if (statement.operands.size() > 3) lowering.source(statement.operands[3], kU32);
  Instruction& instruction =
      lowering.emit(execute_mb_wait, kClassMbarrier,
                    {lowering.predicate_destination(statement.operands[0]), a, v}, 1);
  set_address(lowering, instruction, a, off, space);
  instruction.imm = par;
  instruction.control = kTryWait;
}

static void lower_mbarrier(Lowering& lowering, const Statement& statement) {
  const std::string& k = statement.opcode[1];
  lowering.kernel.uses_mbarrier = true;
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 off;
  int kind;
  size_t mi = 0;
  i32 cnt = lowering.constant(1, 4), st = -1;
  if (k == "init") {
    kind = kMbarrierInit;
    cnt = lowering.source(statement.operands[1], kU32);
  } else if (k == "inval")
    kind = kMbarrierInval;
  else if (k == "expect_tx") {
    kind = kMbarrierExpect;
    cnt = lowering.source(statement.operands[1], kU32);
  } else if (k == "complete_tx") {
    kind = kMbarrierComplete;
    cnt = lowering.source(statement.operands[1], kU32);
  } else if (k == "arrive" || k == "arrive_drop") {
    bool tx = statement.has("expect_tx"), drop = k == "arrive_drop";
    kind =
        drop ? (tx ? kMbarrierDropTx : kMbarrierDrop) : (tx ? kMbarrierArriveTx : kMbarrierArrive);
    if (statement.operands[0].kind != Operand::kMemory) mi = 1;
    if (statement.operands.size() > mi + 1) cnt = lowering.source(statement.operands[mi + 1], kU32);
  } else
    lowering.unsupported();
  i32 a = lowering.address_base(statement.operands[mi], space, off);
  bool has_st = mi == 1 && statement.operands[0].kind != Operand::kSink;
  st = has_st ? lowering.destination(statement.operands[0], kB64) : lowering.temporary(8);
  Instruction& instruction = lowering.emit(execute_mbar, kClassMbarrier, {st, a, cnt}, 1);
  set_address(lowering, instruction, a, off, space);
  instruction.imm = (u32)kind;
  instruction.imm2 = has_st;
}

static void lower_cp_async_arrive(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_mbarrier = true;
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 off;
  i32 a = lowering.address_base(statement.operands[0], space, off);
  Instruction& instruction = lowering.emit(execute_mbar, kClassMbarrier,
                                           {lowering.temporary(8), a, lowering.constant(1, 4)}, 1);
  set_address(lowering, instruction, a, off, space);
  instruction.imm = statement.has("noinc") ? kMbarrierCpAsyncNoinc : kMbarrierCpAsync;
  instruction.imm2 = 0;
}

static const Opcodes kOpcodes{{"mbarrier", lower_mbarrier},
                              {"mbarrier.pending_count", lower_pending_count},
                              {"mbarrier.test_wait", lower_mbarrier_wait},
                              {"mbarrier.try_wait", lower_mbarrier_wait},
                              {"cp.async.mbarrier", lower_cp_async_arrive}};
}  // namespace ptxsim
