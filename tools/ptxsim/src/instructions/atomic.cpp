// Atomic operations on memory: atom and red.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "checks.h"
#include "instructions/access.h"
#include "instructions/half.h"
#include "instructions/integer.h"

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
constexpr u32 kHasResult = 1, kReleases = 2;  // bits of imm2

// Addition, minimum or maximum.
template <class T>
static T add_min_max(AtomicOp op, T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return op == kAtomicAdd   ? canonical_nan(a + b)
           : op == kAtomicMin ? std::fmin(a, b)
                              : std::fmax(a, b);
  else
    return op == kAtomicAdd   ? wrapping_add<T>(a, b)
           : op == kAtomicMin ? std::min(a, b)
                              : std::max(a, b);
}
// K: 0 f16, 1 bf16
template <int K>
static u16 add_min_max_half(AtomicOp op, u64 a, u64 b) {
  return half_from_float<K>(add_min_max(op, half_to_float<K>((u16)a), half_to_float<K>((u16)b)));
}
template <int K>
static u32 add_min_max_pair(AtomicOp op, u64 a, u64 b) {
  return add_min_max_half<K>(op, a, b) | ((u32)add_min_max_half<K>(op, a >> 16, b >> 16) << 16);
}
static u64 arithmetic(Type type, AtomicOp op, u64 old, u64 b) {
  switch (type) {
    case kF32:
      return bits_to<u32>(add_min_max(op, bits_to<float>((u32)old), bits_to<float>((u32)b)));
    case kF64:
      return bits_to<u64>(add_min_max(op, bits_to<double>(old), bits_to<double>(b)));
    case kF16:
      return add_min_max_half<0>(op, old, b);
    case kBf16:
      return add_min_max_half<1>(op, old, b);
    case kF16x2:
      return add_min_max_pair<0>(op, old, b);
    case kBf16x2:
      return add_min_max_pair<1>(op, old, b);
    case kS32:
      return (u32)add_min_max(op, (i32)old, (i32)b);
    case kU32:
    case kB32:
      return add_min_max(op, (u32)old, (u32)b);
    case kS64:
      return (u64)add_min_max(op, (i64)old, (i64)b);
    default:
      return add_min_max(op, old, b);
  }
}
// What the memory holds afterwards.
static u64 apply(Type type, AtomicOp op, u64 old, u64 b, u64 c) {
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
      return arithmetic(type, op, old, b);
  }
}

namespace {
// Operands: results[vector] with kHasResult, address, b[vector], c of cas. imm: the operation.
struct Atomic {
  Warp& warp;
  const Instruction& instruction;
  u32 lanes;
  bool has_result;
  Space space;
  Type type;
  u32 element_bytes, bytes;
  int address_index;  // of the operand that holds the address; the values follow it
  u64 address[32];
  u32 tainted = 0;  // lanes with an operand that depends on uninitialized memory

  Atomic(Warp& warp, const Instruction& instruction, u32 lanes)
      : warp(warp),
        instruction(instruction),
        lanes(lanes),
        has_result(instruction.imm2 & kHasResult),
        space((Space)instruction.space),
        type((Type)instruction.type),
        element_bytes((u32)type_bytes(type)),
        bytes(element_bytes * instruction.vector),
        address_index(has_result ? instruction.vector : 0) {
    lane_addresses(warp, instruction, instruction.operands[address_index], address);
  }

  void check_operands();
  void publish();
  bool depends_on_uninitialized(int lane);
  u8* memory(int lane);
  bool update(int lane, u8* memory);
};
}  // namespace

// Init check: an address or a guard must not depend on uninitialized memory, nor a value that goes
// to memory without a shadow.
void Atomic::check_operands() {
  taint_guard(warp, instruction, lanes);
  i32 address_operand = instruction.operands[address_index];
  if (u32 bad = taint_lanes(warp, address_operand) & lanes)
    taint_fail(warp, bad, taint_origin_of(warp, address_operand),
               "the address of an atomic operation");
  for_each_lane(lanes, [&](int lane) {
    if (has_shadow(warp, lane, space, address[lane], bytes)) return;
    for (int k = address_index + 1; k < instruction.operand_count; k++)
      if ((taint_lanes(warp, instruction.operands[k]) >> lane) & 1)
        taint_fail(warp, 1u << lane, taint_origin_of(warp, instruction.operands[k]),
                   "an operand of an atomic operation");
  });
  for (int k = address_index + 1; k < instruction.operand_count; k++)
    tainted |= taint_lanes(warp, instruction.operands[k]) & lanes;
}

// Weak memory: an atomic operation works on what every CTA sees.
void Atomic::publish() {
  for_each_lane(lanes, [&](int lane) {
    if (!is_global(space, address[lane])) return;
    if (instruction.imm2 & kReleases) weak_fence(warp, 1u << lane);
    weak_publish(warp, address[lane], bytes);
  });
}

// Init check, of the operands or of the memory. Memory that was never written is not meant: there
// the access is an error.
bool Atomic::depends_on_uninitialized(int lane) {
  if ((tainted >> lane) & 1) return true;
  u64 begin = address[lane];
  if (!has_shadow(warp, lane, space, begin, bytes) || bytes_init(warp, lane, space, begin, bytes))
    return false;
  resolve(warp, lane, space, begin, 1, kRead);
  for (u32 k = 0; k < bytes; k++)
    if (shadow_state(warp, lane, space, begin + k) == 0) return false;
  return true;
}

u8* Atomic::memory(int lane) {
  if (!taint_on(warp)) return resolve(warp, lane, space, address[lane], bytes, kAtomic);
  bool derived = depends_on_uninitialized(lane);
  u8* memory = resolve(warp, lane, space, address[lane], bytes, derived ? kWrite : kAtomic);
  if (derived) set_init(warp, lane, space, address[lane], bytes, 2);
  if (has_result)
    for (int k = 0; k < instruction.vector; k++)
      set_taint(warp, instruction.operands[k], 1u << lane, derived ? kFullMask : 0, 0);
  return memory;
}

// True if the memory has changed.
bool Atomic::update(int lane, u8* memory) {
  AtomicOp op = (AtomicOp)instruction.imm;
  const i32* values = instruction.operands + address_index + 1;
  auto value = [&](i32 operand) -> u64 {
    if (element_bytes == 8) return warp.source<u64>(operand)[lane];
    u32 word = warp.source<u32>(operand)[lane];
    return element_bytes == 2 ? word & 0xffff : word;
  };
  bool changed = false;
  for (int k = 0; k < instruction.vector; k++, memory += element_bytes) {
    u64 old = 0;
    memcpy(&old, memory, element_bytes);
    u64 now = apply(type, op, old, value(values[k]), op == kAtomicCas ? value(values[1]) : 0);
    if (now != old) changed = true;
    memcpy(memory, &now, element_bytes);
    if (!has_result) continue;
    if (element_bytes == 8)
      warp.destination<u64>(instruction.operands[k])[lane] = old;
    else
      warp.destination<u32>(instruction.operands[k])[lane] = (u32)old;
  }
  return changed;
}

static void execute_atom(Warp& warp, const Instruction& instruction, u32 lanes) {
  static std::mutex locks[256];  // by address
  Atomic atomic(warp, instruction, lanes);
  if (warp.launch->stats_on)
    count_memory(warp, instruction, atomic.space, atomic.address, lanes, atomic.bytes, true);
  if (taint_on(warp)) atomic.check_operands();
  if (options().weak) atomic.publish();
  bool changed = false;
  for_each_lane(lanes, [&](int lane) {
    u8* memory = atomic.memory(lane);
    std::unique_lock<std::mutex> lock(locks[((u64)memory >> 4) & 255], std::defer_lock);
    if (warp.launch->total > 1) lock.lock();
    if (atomic.update(lane, memory)) changed = true;
  });
  if (changed) {
    warp.cta->cluster->progress++;
    warp.launch->progress.fetch_add(1, std::memory_order_relaxed);
  }
}

static void lower_atomic(Lowering& lowering, const Statement& statement) {
  if (statement.has("async")) lowering.unsupported();
  static const char* names[] = {"add", "min",  "max", "and", "or",
                                "xor", "exch", "cas", "inc", "dec"};
  int op = -1;
  for (int k = 0; k < 10; k++)
    if (statement.has(names[k])) op = k;
  if (op < 0) lowering.unsupported();
  Type type = lowering.last_type();
  if (type_bytes(type) > 8) lowering.unsupported();
  int vector = vector_length(statement);
  bool has_result = statement.name() == "atom";
  size_t memory = has_result ? 1 : 0;  // index of the operand
  Space space = lowering.memory_space(statement.operands[memory], lowering.space());
  i64 offset;
  i32 base = lowering.address_base(statement.operands[memory], space, offset);
  std::vector<i32> values, ids;
  for (auto& operand : elements_of(statement.operands[memory + 1]))
    values.push_back(lowering.source(operand, type));
  if (op == kAtomicCas) values.push_back(lowering.source(statement.operands[memory + 2], type));
  if (has_result)
    for (auto& operand : elements_of(statement.operands[0]))
      ids.push_back(lowering.destination(operand, type));
  ids.push_back(base);
  ids.insert(ids.end(), values.begin(), values.end());
  Instruction& instruction =
      lowering.emit(execute_atom, kClassAtomic, ids, has_result ? vector : 0);
  set_address_operand(lowering, instruction, base, offset);
  instruction.space = space;
  instruction.type = type;
  instruction.imm = (u32)op;
  bool releases = (statement.has("release") || statement.has("acq_rel")) && !statement.has("cta");
  instruction.imm2 = (has_result ? kHasResult : 0) | (releases ? kReleases : 0);
  instruction.vector = (u8)vector;
  instruction.propagates_taint = true;
}

static const Opcodes kOpcodes{{"atom", lower_atomic}, {"red", lower_atomic}};
}  // namespace ptxsim
