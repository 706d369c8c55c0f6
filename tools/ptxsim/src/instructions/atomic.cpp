// Atomic operations on memory: atom and red.
#include <algorithm>
#include <mutex>

#include "checks.h"
#include "exec.h"
#include "fp.h"
#include "instructions/access.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
enum AtomicOp {
  kAtomicAdd,
  kAtomicMin,
  kAtomicMax,
  kAtomicAnd,
  kAtomicOr,
  kAtomicXor,
  kAtomicExchange,
  kAtomicCas,
  kAtomicIncrement,
  kAtomicDecrement
};
static std::mutex g_locks[256];
static u64 atom_apply(Type type, int op, u64 old, u64 b, u64 c) {
  switch (op) {
    case kAtomicAnd:
      return old & b;
    case kAtomicOr:
      return old | b;
    case kAtomicXor:
      return old ^ b;
    case kAtomicExchange:
      return b;
    case kAtomicCas:
      return old == b ? c : old;
    case kAtomicIncrement:
      return (u32)old >= (u32)b ? 0 : (u32)old + 1;
    case kAtomicDecrement:
      return ((u32)old == 0 || (u32)old > (u32)b) ? (u32)b : (u32)old - 1;
    default:
      break;
  }
  auto half = [&](int K, u16 x, u16 y) -> u16 {
    float f = K == 0 ? half_bits_to_float(x) : bf16_to_float(x),
          g = K == 0 ? half_bits_to_float(y) : bf16_to_float(y);
    float r = op == kAtomicAdd ? f + g : op == kAtomicMin ? std::fmin(f, g) : std::fmax(f, g);
    return K == 0 ? float_to_half_bits(r) : float_to_bf16(r);
  };
  switch (type) {
    case kF32: {
      float f = bits_to<float>((u32)old), g = bits_to<float>((u32)b);
      return bits_to<u32>(op == kAtomicAdd   ? canonical_nan(f + g)
                          : op == kAtomicMin ? std::fmin(f, g)
                                             : std::fmax(f, g));
    }
    case kF64: {
      double f = bits_to<double>(old), g = bits_to<double>(b);
      return bits_to<u64>(op == kAtomicAdd   ? canonical_nan(f + g)
                          : op == kAtomicMin ? std::fmin(f, g)
                                             : std::fmax(f, g));
    }
    case kF16:
      return half(0, (u16)old, (u16)b);
    case kBf16:
      return half(1, (u16)old, (u16)b);
    case kF16x2:
    case kBf16x2: {
      int K = type == kBf16x2;
      return (u32)half(K, (u16)old, (u16)b) |
             ((u32)half(K, (u16)(old >> 16), (u16)(b >> 16)) << 16);
    }
    case kS32: {
      i32 x = (i32)old, y = (i32)b;
      return op == kAtomicAdd ? (u32)(x + (u32)y)
                              : (u32)(op == kAtomicMin ? std::min(x, y) : std::max(x, y));
    }
    case kU32:
    case kB32: {
      u32 x = (u32)old, y = (u32)b;
      return op == kAtomicAdd ? x + y : op == kAtomicMin ? std::min(x, y) : std::max(x, y);
    }
    case kS64: {
      i64 x = (i64)old, y = (i64)b;
      return op == kAtomicAdd ? (u64)x + (u64)y
                              : (u64)(op == kAtomicMin ? std::min(x, y) : std::max(x, y));
    }
    default: {
      u64 x = old, y = b;
      return op == kAtomicAdd ? x + y : op == kAtomicMin ? std::min(x, y) : std::max(x, y);
    }
  }
}
static bool derived(Warp& warp, int lane, Space space, u64 a, u32 n) {
  for (u32 k = 0; k < n; k++)
    if (shadow_state(warp, lane, space, a + k) == 0) return false;
  return true;
}
// atom: o: dests[vec], addr, b[vec], (c); red: addr, b[vec]. imm: op, imm2 bit0: has result
static void execute_atom(Warp& warp, const Instruction& instruction, u32 lanes) {
  int v = instruction.vector, has_d = (int)(instruction.imm2 & 1);
  const i32* o = instruction.operands + (has_d ? v : 0);
  u64 a[32];
  lane_addresses(warp, instruction, o[0], a);
  u32 element_bytes = (u32)type_bytes((Type)instruction.type), n = element_bytes * (u32)v;
  bool w8 = element_bytes == 8;
  auto get = [&](i32 id, int lane) -> u64 {
    return w8 ? warp.source<u64>(id)[lane] : warp.source<u32>(id)[lane];
  };
  u32 tainted = 0;
  if (warp.launch->stats_on)
    count_memory(warp, instruction, (Space)instruction.space, a, lanes, n, true);
  if (taint_on(warp)) {
    taint_guard(warp, instruction, lanes);
    if (u32 t = taint_lanes(warp, o[0]) & lanes)
      taint_fail(warp, t, taint_origin_of(warp, o[0]), "the address of an atomic operation");
    for_each_lane(lanes, [&](int lane) {
      if (!has_shadow(warp, lane, (Space)instruction.space, a[lane], n))
        for (int k = (has_d ? v : 0) + 1; k < instruction.operand_count; k++)
          if ((taint_lanes(warp, instruction.operands[k]) >> lane) & 1)
            taint_fail(warp, 1u << lane, taint_origin_of(warp, instruction.operands[k]),
                       "an operand of an atomic operation");
    });
    for (int k = (has_d ? v : 0) + 1; k < instruction.operand_count; k++)
      tainted |= taint_lanes(warp, instruction.operands[k]) & lanes;
  }
  bool changed = false;
  if (options().weak)
    for_each_lane(lanes, [&](int lane) {
      if (is_global((Space)instruction.space, a[lane])) {
        if (instruction.imm2 & 2) weak_fence(warp, 1u << lane);
        weak_publish(warp, a[lane], n);
      }
    });
  for_each_lane(lanes, [&](int lane) {
    bool tl = (tainted >> lane) & 1;
    if (taint_on(warp) && !tl && has_shadow(warp, lane, (Space)instruction.space, a[lane], n) &&
        !bytes_init(warp, lane, (Space)instruction.space, a[lane], n)) {
      // a cell that was never written is an error (below); one holding a derived value stays so
      u8* q0 = resolve(warp, lane, (Space)instruction.space, a[lane], 1, kRead);
      (void)q0;
      tl = derived(warp, lane, (Space)instruction.space, a[lane], n);
    }
    u8* p = resolve(warp, lane, (Space)instruction.space, a[lane], n, tl ? kWrite : kAtomic);
    if (taint_on(warp)) {
      if (tl) set_init(warp, lane, (Space)instruction.space, a[lane], n, 2);
      if (has_d)
        for (int k = 0; k < v; k++)
          set_taint(warp, instruction.operands[k], 1u << lane, tl ? kFullMask : 0, 0);
    }
    std::unique_lock<std::mutex> lk(g_locks[((u64)p >> 4) & 255], std::defer_lock);
    if (warp.launch->total > 1) lk.lock();
    for (int k = 0; k < v; k++) {
      u64 old = 0;
      memcpy(&old, p + k * element_bytes, element_bytes);
      u64 b = get(o[1 + k], lane);
      u64 c = instruction.imm == kAtomicCas ? get(o[2], lane) : 0;
      if (element_bytes == 2) {
        b &= 0xffff;
        c &= 0xffff;
      }
      u64 nv = atom_apply((Type)instruction.type, (int)instruction.imm, old, b, c);
      if (nv != old) changed = true;
      memcpy(p + k * element_bytes, &nv, element_bytes);
      if (has_d) {
        if (w8)
          warp.destination<u64>(instruction.operands[k])[lane] = old;
        else
          warp.destination<u32>(instruction.operands[k])[lane] = (u32)old;
      }
    }
  });
  if (changed) {
    warp.cta->cluster->progress++;
    warp.launch->progress.fetch_add(1, std::memory_order_relaxed);
  }
}

static void lower_atomic(Lowering& lowering, const Statement& statement) {
  if (statement.has("async")) lowering.unsupported();
  static const char* nm[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
  int op = -1;
  for (int k = 0; k < 10; k++)
    if (statement.has(nm[k])) op = k;
  if (op < 0) lowering.unsupported();
  Type type = lowering.last_type();
  if (type_bytes(type) > 8) lowering.unsupported();
  int v = vector_length(statement);
  bool red = statement.name() == "red";
  size_t mi = red ? 0 : 1;
  Space space = lowering.memory_space(statement.operands[mi], lowering.space());
  i64 off;
  i32 base = lowering.address_base(statement.operands[mi], space, off);
  auto elems = [&](const Operand& operand) {
    return operand.kind == Operand::kVector ? operand.elements : std::vector<Operand>{operand};
  };
  std::vector<i32> src, ids;
  for (auto& x : elems(statement.operands[mi + 1])) src.push_back(lowering.source(x, type));
  if (op == kAtomicCas) src.push_back(lowering.source(statement.operands[mi + 2], type));
  if (!red)
    for (auto& d : elems(statement.operands[0])) ids.push_back(lowering.destination(d, type));
  ids.push_back(base);
  for (i32 x : src) ids.push_back(x);
  Instruction& instruction = lowering.emit(execute_atom, kClassAtomic, ids, red ? 0 : v);
  set_address_operand(lowering, instruction, base, off);
  instruction.space = space;
  instruction.type = type;
  instruction.imm = (u32)op;
  instruction.imm2 =
      (red ? 0 : 1) |
      ((statement.has("release") || statement.has("acq_rel")) && !statement.has("cta") ? 2 : 0);
  instruction.vector = (u8)v;
  instruction.propagates_taint = true;
}

static const Opcodes kOpcodes{{"atom", lower_atomic}, {"red", lower_atomic}};
}  // namespace ptxsim
