// Loads, stores, fences and prefetches.

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"
#include "instructions/handlers.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
static void execute_fence(Warp& warp, const Instruction& instruction, u32 lanes) {
  if (options().weak && instruction.imm) weak_fence(warp, lanes);
}

// Operands of ld: destinations[vector], address; of st: address, values[vector]. type: bytes of an
// element, type2: whether ld extends the sign; imm: bytes of a destination's or value's register.

// Init check: an address must not depend on uninitialized memory.
static void check_address(Warp& warp, const Instruction& instruction, i32 address, u32 lanes,
                          const char* what) {
  taint_guard(warp, instruction, lanes);
  if (u32 bad = taint_lanes(warp, address) & lanes)
    taint_fail(warp, bad, taint_origin_of(warp, address), what);
}
// Init check: nor a value that is stored where no shadow can follow it.
static void check_values(Warp& warp, const Instruction& instruction, u32 lanes,
                         const u64* addresses) {
  Space space = (Space)instruction.space;
  u32 element_bytes = instruction.type;
  for_each_lane(lanes, [&](int lane) {
    for (u32 k = 0; k < instruction.vector; k++) {
      i32 value = instruction.operands[1 + k];
      if (((taint_lanes(warp, value) >> lane) & 1) && is_global(space, addresses[lane]) &&
          !has_shadow(warp, lane, space, addresses[lane] + k * element_bytes, element_bytes))
        taint_fail(warp, 1u << lane, taint_origin_of(warp, value),
                   "a value stored to global memory");
    }
  });
}
static void taint_loaded(Warp& warp, const Instruction& instruction, int lane, u64 address) {
  Space space = (Space)instruction.space, origin_space = space;
  if (space == kGeneric) origin_space = in_shared(address) ? kShared : kGlobal;
  u32 element_bytes = instruction.type;
  for (u32 k = 0; k < instruction.vector; k++, address += element_bytes) {
    bool initialized = bytes_init(warp, lane, space, address, element_bytes);
    set_taint(warp, instruction.operands[k], 1u << lane, initialized ? 0 : kFullMask,
              initialized ? 0 : taint_origin(warp, instruction, origin_space, address));
  }
}
static void taint_stored(Warp& warp, const Instruction& instruction, int lane, u64 address) {
  u32 element_bytes = instruction.type;
  for (u32 k = 0; k < instruction.vector; k++)
    set_init(warp, lane, (Space)instruction.space, address + k * element_bytes, element_bytes,
             ((taint_lanes(warp, instruction.operands[1 + k]) >> lane) & 1) ? 2 : 1);
}

static void execute_ld(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64 addresses[32];
  i32 address_operand = instruction.operands[instruction.vector];
  lane_addresses(warp, instruction, address_operand, addresses);
  Space space = (Space)instruction.space;
  u32 element_bytes = instruction.type, bytes = element_bytes * instruction.vector;
  if (__builtin_expect(warp.launch->stats_on, 0))
    count_memory(warp, instruction, space, addresses, lanes, bytes, false);
  if (__builtin_expect(taint_on(warp), 0))
    check_address(warp, instruction, address_operand, lanes, "the address of a load");
  for_each_lane(lanes, [&](int lane) {
    const u8* memory = resolve(warp, lane, space, addresses[lane], bytes, kRead);
    u8 visible[64];
    if (__builtin_expect(options().weak, 0) && !warp.cta->weak.empty() &&
        is_global(space, addresses[lane])) {
      memcpy(visible, memory, bytes);
      weak_load(warp, addresses[lane], visible, bytes);
      memory = visible;
    }
    if (__builtin_expect(taint_on(warp), 0)) taint_loaded(warp, instruction, lane, addresses[lane]);
    for (u32 k = 0; k < instruction.vector; k++, memory += element_bytes) {
      void* destination = warp.destination(instruction.operands[k]);
      if (element_bytes == 4 && instruction.imm == 4) {
        memcpy((u32*)destination + lane, memory, 4);
        continue;
      }
      if (element_bytes == 16) {
        memcpy((u64*)destination + 2 * lane, memory, 16);
        continue;
      }
      u64 value = 0;
      memcpy(&value, memory, element_bytes);
      if (instruction.type2) {
        int shift = 64 - 8 * (int)element_bytes;
        value = (u64)((i64)(value << shift) >> shift);
      }
      if (instruction.imm == 8)
        ((u64*)destination)[lane] = value;
      else
        ((u32*)destination)[lane] = (u32)value;
    }
  });
}

constexpr u32 kStoreStrong = 1, kStoreReleases = 2;  // bits of st's imm2

static void execute_st(Warp& warp, const Instruction& instruction, u32 lanes) {
  u64 addresses[32];
  lane_addresses(warp, instruction, instruction.operands[0], addresses);
  Space space = (Space)instruction.space;
  u32 element_bytes = instruction.type, bytes = element_bytes * instruction.vector;
  if (__builtin_expect(warp.launch->stats_on, 0))
    count_memory(warp, instruction, space, addresses, lanes, bytes, true);
  if (__builtin_expect(taint_on(warp), 0)) {
    check_address(warp, instruction, instruction.operands[0], lanes, "the address of a store");
    check_values(warp, instruction, lanes, addresses);
  }
  for_each_lane(lanes, [&](int lane) {
    u8* memory = resolve(warp, lane, space, addresses[lane], bytes, kWrite);
    if (__builtin_expect(taint_on(warp), 0)) taint_stored(warp, instruction, lane, addresses[lane]);
    u8 buffer[64];
    bool buffered = false;
    if (__builtin_expect(options().weak, 0) && is_global(space, addresses[lane])) {
      if (instruction.imm2 & kStoreReleases) weak_fence(warp, 1u << lane);
      buffered = !instruction.imm2;
      if (buffered)
        memory = buffer;
      else
        weak_publish(warp, addresses[lane], bytes);
    }
    for (u32 k = 0; k < instruction.vector; k++, memory += element_bytes) {
      const void* source = warp.source(instruction.operands[1 + k]);
      if (element_bytes == 4)
        memcpy(memory, (const u32*)source + (instruction.imm == 8 ? 2 * lane : lane), 4);
      else if (element_bytes == 8)
        memcpy(memory, (const u64*)source + lane, 8);
      else if (element_bytes == 16)
        memcpy(memory, (const u64*)source + 2 * lane, 16);
      else if (instruction.imm == 8)
        memcpy(memory, (const u64*)source + lane, element_bytes);
      else
        memcpy(memory, (const u32*)source + lane, element_bytes);
    }
    if (buffered) weak_store(warp, lane, addresses[lane], buffer, bytes);
  });
  if (space != kLocal) warp.cta->cluster->progress++;
}

static void lower_ld(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  int vector = vector_length(statement);
  Space space = lowering.memory_space(statement.operands[1], lowering.space());
  i64 offset;
  i32 base = lowering.address_base(statement.operands[1], space, offset);
  u32 element_bytes = (u32)type_bytes(type), slot = 0;
  std::vector<i32> ids;
  std::vector<Operand> destinations = elements_of(statement.operands[0]);
  if ((int)destinations.size() != vector) lowering.fail("vector size mismatch");
  for (auto& destination : destinations) {
    if (destination.kind == Operand::kSink) {
      ids.push_back(lowering.temporary(slot ? slot : element_bytes <= 4 ? 4 : element_bytes));
      if (!slot) slot = element_bytes <= 4 ? 4 : element_bytes;
      continue;
    }
    if (destination.kind != Operand::kRegister) lowering.fail("register expected");
    i32 id = lowering.register_id(destination);
    u32 size = lowering.slot_of(id);
    if (slot && size != slot) lowering.fail("destination registers of different sizes");
    if (size < element_bytes) lowering.fail("destination register too small");
    slot = size;
    ids.push_back(id);
  }
  ids.push_back(base);
  bool is_signed = type_is_signed(type);
  InstructionClass instruction_class = space == kShared                        ? kClassLoadShared
                                       : space == kGlobal || space == kGeneric ? kClassLoadGlobal
                                                                               : kClassLocal;
  Instruction& instruction = lowering.emit(execute_ld, instruction_class, ids, vector);
  set_address_operand(lowering, instruction, base, offset);
  instruction.space = space;
  instruction.vector = (u8)vector;
  instruction.type = (u8)element_bytes;
  instruction.type2 = is_signed;
  instruction.imm = slot;
  instruction.propagates_taint = true;
}

static void lower_st(Lowering& lowering, const Statement& statement) {
  if (statement.has("async") || statement.has("bulk")) lowering.unsupported();
  Type type = lowering.last_type();
  int vector = vector_length(statement);
  Space space = lowering.memory_space(statement.operands[0], lowering.space());
  if (space == kParam && statement.operands[0].elements[0].kind != Operand::kSymbol)
    lowering.fail("st.param through a register");
  i64 offset;
  i32 base = lowering.address_base(statement.operands[0], space, offset);
  u32 element_bytes = (u32)type_bytes(type);
  std::vector<i32> ids{base};
  std::vector<Operand> values = elements_of(statement.operands[1]);
  if ((int)values.size() != vector) lowering.fail("vector size mismatch");
  u32 slot = 0;
  for (auto& value : values) {
    i32 id = value.kind == Operand::kRegister ? lowering.register_id(value)
                                              : lowering.source(value, type);
    if (value.kind == Operand::kRegister &&
        lowering.slot_of(id) != (element_bytes <= 4 ? 4u : element_bytes)) {
      if (lowering.slot_of(id) < element_bytes) lowering.fail("source register too small");
      id = lowering.source(value, type);
    }
    slot = lowering.slot_of(id);
    ids.push_back(id);
  }
  Instruction& instruction =
      lowering.emit(execute_st,
                    space == kShared                        ? kClassStoreShared
                    : space == kGlobal || space == kGeneric ? kClassStoreGlobal
                                                            : kClassLocal,
                    ids, 0);
  set_address_operand(lowering, instruction, base, offset);
  instruction.space = space;
  instruction.vector = (u8)vector;
  instruction.type = (u8)element_bytes;
  instruction.imm = slot;
  instruction.propagates_taint = true;
  bool strong = statement.has("volatile") || statement.has("relaxed") || statement.has("mmio");
  bool releases = statement.has("release") && !statement.has("cta");
  instruction.imm2 = (strong ? kStoreStrong : 0) | (releases ? kStoreReleases : 0);
}

static void lower_fence(Lowering& lowering, const Statement& statement) {
  bool fence =
      (statement.name() == "fence" && !statement.has("proxy") && !statement.has("mbarrier_init")) ||
      statement.name() == "membar";
  lowering
      .emit(
          execute_fence,
          statement.name() == "fence" || statement.name() == "membar" ? kClassBarrier : kClassOther,
          {}, 0)
      .imm = fence && !statement.has("cta") && !statement.has("cluster");
}

static void lower_createpolicy(Lowering& lowering, const Statement& statement) {
  i32 zero = lowering.constant(0, 8);
  lowering.emit(execute_mov64, kClassOther,
                {lowering.destination(statement.operands[0], kB64), zero}, 1);
}

static const Opcodes kOpcodes{{"ld", lower_ld},           {"ldu", lower_ld},
                              {"st", lower_st},           {"prefetch", lower_fence},
                              {"prefetchu", lower_fence}, {"applypriority", lower_fence},
                              {"discard", lower_fence},   {"membar", lower_fence},
                              {"fence", lower_fence},     {"createpolicy", lower_createpolicy}};
}  // namespace ptxsim
