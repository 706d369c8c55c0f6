#include "instructions/bulk.h"

#include "checks.h"
#include "instructions/handlers.h"
#include "instructions/mbarrier.h"
#include "instructions/moves.h"
#include "lower/opcodes.h"

namespace ptxsim {
void check_global(Warp& warp, int lane, u64 address, u64 bytes, bool store) {
  const Allocation* allocation = warp.launch->allocations->find(address);
  if (!allocation || address - allocation->base >= allocation->size ||
      address - allocation->base + bytes > allocation->size)
    warp.fail(
        kErrorAddress, lane,
        format(
            "TMA %s of %llu bytes at 0x%llx lies outside every allocation\n    %s",
            store ? "store" : "load", (unsigned long long)bytes, (unsigned long long)address,
            memory_describe(address + (allocation && address - allocation->base < allocation->size
                                           ? allocation->size - (address - allocation->base)
                                           : 0))
                .c_str()));
  if (warp.launch->check_init && allocation->init && store)
    memset(allocation->init + (address - allocation->base), 1, bytes);
}

void shared_range(Warp& warp, int lane, Cta& cta, u32 offset, u32 bytes, u32 align,
                  const char* what) {
  if (offset % align)
    warp.fail(kErrorMisaligned, lane,
              format("%s: shared address 0x%x is not %u-byte aligned", what, offset, align));
  if (offset < cta.shared_begin || (u64)offset + bytes > cta.shared_end)
    warp.fail(
        kErrorAddress, lane,
        format("%s: shared range 0x%x..0x%x lies outside the CTA's shared memory (0x%x..0x%x)",
               what, offset, offset + bytes, cta.shared_begin, cta.shared_end));
}

void enqueue(Warp& warp, const Instruction& instruction, int lane, std::function<void()> action) {
  Cluster& cluster = *warp.cta->cluster;
  int delay = options().async_delay;
  if (options().seed) delay = 1 + (int)warp.worker->random(24);
  u64 due =
      options().seed
          ? cluster.round + warp.worker->random((u32)delay)
          : cluster.round +
                (u64)(delay > 0 ? 1 + (cluster.progress * 2654435761u >> 7) % (u32)(delay * 2) : 0);
  Warp* warp_pointer = &warp;
  u32 pc = (u32)(&instruction - warp.launch->kernel->code.data());
  auto run = [warp_pointer, pc, lane, action] {
    try {
      action();
    } catch (SimError& error) {
      auto& id = warp_pointer->cta->id;
      throw SimError(error.kind,
                     std::string(error.what()) + "\n    at " +
                         warp_pointer->launch->kernel->where(pc) +
                         format("\n    block (%u,%u,%u) warp %d lane %d (asynchronous copy)", id[0],
                                id[1], id[2], warp_pointer->id, lane));
    }
  };
  if (delay <= 0) {
    run();
    return;
  }
  // keep the queue sorted by due round, first in first out among equals
  auto place = cluster.async.end();
  while (place != cluster.async.begin() && std::prev(place)->first > due) --place;
  cluster.async.insert(place, {due, run});
}

Landing landing_of(Warp& warp, const BulkInfo& info, int lane, u32 destination, u32 barrier,
                   i32 mask_operand) {
  size_t ctas = warp.cta->cluster->ctas.size();
  Landing landing;
  landing.mask = info.multicast ? warp.source<u32>(mask_operand)[lane] & 0xffff
                                : 1u << cta_of(warp, lane, destination)->rank;
  if (!landing.mask || (landing.mask >> ctas))
    warp.fail(
        kErrorLaunch, lane,
        format("multicast mask 0x%x names CTAs outside the cluster of %zu", landing.mask, ctas));
  landing.barrier_rank = info.multicast ? -1 : (int)cta_of(warp, lane, barrier)->rank;
  landing.offset = destination & 0xffffff;
  landing.barrier_offset = barrier & 0xffffff;
  return landing;
}

void check_landing(Warp& warp, const Landing& landing, int lane, u32 bytes, u32 align,
                   const char* what, const std::vector<u32>& clock) {
  Cluster& cluster = *warp.cta->cluster;
  for (u32 rank = 0; rank < cluster.ctas.size(); rank++)
    if (landing.has(rank)) {
      shared_range(warp, lane, cluster.ctas[rank], landing.offset, bytes, align, what);
      mbarrier_get(warp, lane, landing.barrier_address(rank));
    }
  if (!warp.launch->check_race) return;
  for (u32 rank = 0; rank < cluster.ctas.size(); rank++)
    if (landing.has(rank))
      race_access(warp, lane, cluster.ctas[rank], landing.offset, bytes, true, true, &clock);
}

void complete_landing(Warp& warp, const Landing& landing, int lane, u32 rank, u32 bytes,
                      const std::vector<u32>& clock) {
  Cta& cta = warp.cta->cluster->ctas[landing.rank_of_barrier(rank)];
  if (warp.launch->check_race) clock_join(mbarrier_clock(cta, landing.barrier_offset), clock);
  mbarrier_complete_bytes(warp, lane, landing.barrier_address(rank), -(i32)bytes);
}

// ---- completion of stores
static void run_linear_store(Warp& warp, BulkCopy& copy) {
  int lane = copy.lane;
  u32 offset = copy.shared_address & 0xffffff;
  Cta& cta = *warp.cta;
  if (cta.shadow) {
    if (warp.launch->check_init) init_read(warp, lane, cta, offset, copy.bytes);
    if (warp.launch->check_race) race_access(warp, lane, cta, offset, copy.bytes, false, false);
  }
  check_global(warp, lane, copy.global_address, copy.bytes, true);
  if (copy.kind == BulkCopy::kLinearStore)
    memcpy((void*)copy.global_address, cta.shared + offset, copy.bytes);
  else
    reduce_bytes((u8*)copy.global_address, cta.shared + offset, copy.bytes, copy.type,
                 copy.reduction);
}

static void run_bulk_copy(Warp& warp, BulkCopy& copy) {
  warp.cta->cluster->progress++;
  warp.launch->progress.fetch_add(1, std::memory_order_relaxed);
  if (copy.kind == BulkCopy::kTensorStore || copy.kind == BulkCopy::kTensorReduce)
    run_tensor_store(warp, copy);
  else
    run_linear_store(warp, copy);
}

// Completes all but the newest `keep` committed bulk groups of the lanes m (all: everything, at
// exit).
void finish_bulk_copies(Warp& warp, u32 lanes, u32 keep, bool all) {
  if (warp.bulk_copies.empty()) return;
  std::vector<BulkCopy> copies;
  copies.swap(warp.bulk_copies);
  for (auto& copy : copies) {
    bool due =
        ((lanes >> copy.lane) & 1) && (all || copy.group + keep < warp.bulk_group[copy.lane]);
    if (due)
      run_bulk_copy(warp, copy);
    else
      warp.bulk_copies.push_back(copy);
  }
}
static void execute_bulk_commit(Warp& warp, const Instruction&, u32 lanes) {
  for_each_lane(lanes, [&](int lane) { warp.bulk_group[lane]++; });
}
static void execute_bulk_wait(Warp& warp, const Instruction& instruction, u32 lanes) {
  finish_bulk_copies(warp, lanes, instruction.imm, false);
}

// ---- linear copies
// What a linear copy from `source` gives.
static const u8* linear_source(Warp& warp, int lane, u64 source, u32 bytes, bool shared) {
  if (!shared) {
    check_global(warp, lane, source, bytes, false);
    return (const u8*)source;
  }
  u32 offset = (u32)source & 0xffffff;
  shared_range(warp, lane, *warp.cta, offset, bytes, 16, "cp.async.bulk");
  return warp.cta->shared + offset;
}

static void finish_linear_load(Warp& warp, int lane, u64 source, u32 bytes, bool shared,
                               const Landing& landing, const std::vector<u32>& clock) {
  Cluster& cluster = *warp.cta->cluster;
  const u8* data = linear_source(warp, lane, source, bytes, shared);
  for (u32 rank = 0; rank < cluster.ctas.size(); rank++) {
    if (!landing.has(rank)) continue;
    Cta& cta = cluster.ctas[rank];
    if (cta.done)
      warp.fail(kErrorLaunch, lane, "a bulk copy completes after its destination CTA has exited");
    memmove(cta.shared + landing.offset, data, bytes);
    if (cta.shadow && warp.launch->check_init)
      for (u32 k = 0; k < bytes; k++)
        init_set(cta, landing.offset + k, 1,
                 shared ? warp.cta->shadow->init[((u32)source & 0xffffff) + k]
                        : shadow_state(warp, lane, kGlobal, source + k));
    complete_landing(warp, landing, lane, rank, bytes, clock);
  }
}

enum { kGlobalToShared, kSharedToShared, kSharedToGlobal, kReduceToGlobal };

static void issue_linear_load(Warp& warp, const Instruction& instruction, int lane, u64 source,
                              u32 destination, u32 bytes) {
  const BulkInfo& info = *(const BulkInfo*)instruction.aux;
  u32 barrier = (u32)address_of(warp, instruction, instruction.operands[3], info.wide_barrier,
                                info.barrier_offset, lane);
  Landing landing = landing_of(warp, info, lane, destination, barrier,
                               info.multicast ? instruction.operands[4] : 0);
  std::vector<u32> clock;
  if (warp.launch->check_race) clock = warp.clock;
  check_landing(warp, landing, lane, bytes, 16, "cp.async.bulk", clock);
  Warp* issuer = &warp;
  bool shared = instruction.imm == kSharedToShared;
  enqueue(warp, instruction, lane, [issuer, lane, source, bytes, shared, landing, clock] {
    finish_linear_load(*issuer, lane, source, bytes, shared, landing, clock);
  });
}

static void issue_linear_store(Warp& warp, const Instruction& instruction, int lane, u32 source,
                               u64 destination, u32 bytes) {
  const BulkInfo& info = *(const BulkInfo*)instruction.aux;
  BulkCopy copy{};
  copy.kind = instruction.imm == kReduceToGlobal ? BulkCopy::kLinearReduce : BulkCopy::kLinearStore;
  copy.lane = (u8)lane;
  copy.reduction = info.op;
  copy.type = info.type;
  copy.group = warp.bulk_group[lane];
  copy.pc = instruction.line;
  copy.global_address = destination;
  copy.shared_address = source;
  copy.bytes = bytes;
  shared_range(warp, lane, *warp.cta, source & 0xffffff, bytes, 16, "cp.async.bulk");
  warp.bulk_copies.push_back(copy);
}

// Operands: destination, source, size, [mbarrier], [mask]; imm: one of the kinds above.
static void execute_bulk(Warp& warp, const Instruction& instruction, u32 lanes) {
  const BulkInfo& info = *(const BulkInfo*)instruction.aux;
  for_each_lane(lanes, [&](int lane) {
    u64 destination = address_of(warp, instruction, instruction.operands[0], info.wide_destination,
                                 info.destination_offset, lane);
    u64 source = address_of(warp, instruction, instruction.operands[1], info.wide_source,
                            info.source_offset, lane);
    u32 bytes = warp.source<u32>(instruction.operands[2])[lane];
    if (bytes % 16)
      warp.fail(kErrorLaunch, lane, format("cp.async.bulk size %u is not a multiple of 16", bytes));
    if ((destination | source) & 15)
      warp.fail(kErrorMisaligned, lane,
                format("cp.async.bulk addresses 0x%llx, 0x%llx are not 16-byte aligned",
                       (unsigned long long)destination, (unsigned long long)source));
    warp.worker->stats.bulk_bytes += bytes;
    if (instruction.imm == kGlobalToShared || instruction.imm == kSharedToShared)
      issue_linear_load(warp, instruction, lane, source, (u32)destination, bytes);
    else
      issue_linear_store(warp, instruction, lane, (u32)source, destination, bytes);
  });
}

// Operands: address, mbarrier, values[vector]; type: bytes of an element.
static void execute_st_async(Warp& warp, const Instruction& instruction, u32 lanes) {
  const BulkInfo& info = *(const BulkInfo*)instruction.aux;
  u32 element_bytes = instruction.type, bytes = element_bytes * instruction.vector;
  for_each_lane(lanes, [&](int lane) {
    u32 address = (u32)address_of(warp, instruction, instruction.operands[0], info.wide_destination,
                                  info.destination_offset, lane);
    u32 barrier = (u32)address_of(warp, instruction, instruction.operands[1], info.wide_barrier,
                                  info.barrier_offset, lane);
    u8* memory = shared_pointer(warp, lane, address, bytes, kWrite);
    for (u32 k = 0; k < instruction.vector; k++) {
      if (element_bytes == 8)
        memcpy(memory + k * element_bytes, warp.source<u64>(instruction.operands[2 + k]) + lane, 8);
      else
        memcpy(memory + k * element_bytes, warp.source<u32>(instruction.operands[2 + k]) + lane,
               element_bytes);
    }
    if (warp.launch->check_race)
      clock_release(warp, mbarrier_clock(*cta_of(warp, lane, barrier), barrier & 0xffffff));
    mbarrier_complete_bytes(warp, lane, barrier, -(i32)bytes);
  });
}

// ---- lowering
static void lower_linear_copy(Lowering& lowering, const Statement& statement, BulkInfo* info,
                              bool reduces) {
  // linear: spaces in order destination, source
  std::vector<std::string> spaces;
  for (auto& word : statement.opcode)
    if (word == "global" || word == "shared::cta" || word == "shared::cluster")
      spaces.push_back(word);
  if (spaces.size() != 2) lowering.unsupported();
  i32 destination = lowering.address_base(statement.operands[0], kGlobal, info->destination_offset),
      source = lowering.address_base(statement.operands[1], kGlobal, info->source_offset),
      bytes = lowering.source(statement.operands[2], kU32);
  info->wide_destination = lowering.slot_of(destination) == 8;
  info->wide_source = lowering.slot_of(source) == 8;
  std::vector<i32> ids{destination, source, bytes};
  u32 kind;
  if (spaces[0] == "global") {
    kind = reduces ? 3 : 2;
    if (reduces) {
      int data_type = data_type_of(lowering.last_type());
      if (data_type < 0) lowering.unsupported();
      info->type = (u8)data_type;
    }
  } else {
    if (reduces) lowering.unsupported();
    kind = spaces[1] == "global" ? 0 : 1;
    i32 barrier = lowering.address_base(statement.operands[3], kShared, info->barrier_offset);
    info->wide_barrier = lowering.slot_of(barrier) == 8;
    ids.push_back(barrier);
    if (info->multicast) ids.push_back(lowering.source(statement.operands[4], kB16));
  }
  Instruction& instruction = lowering.emit(execute_bulk, kClassTma, ids, 0);
  instruction.aux = info;
  instruction.imm = kind;
}

static void lower_bulk_copy(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_bulk = true;
  if (statement.has("prefetch")) {
    lowering.emit(execute_nop, kClassTma, {}, 0);
    return;
  }
  auto* info = new BulkInfo;
  bool reduces = statement.opcode[1] == "reduce";
  if (reduces) {
    int op = reduction_from_name(statement);
    if (op < 0) lowering.unsupported();
    info->op = (u8)op;
  }
  info->multicast = statement.has("multicast::cluster");
  for (auto& word : statement.opcode)
    if (word.compare(0, 6, "im2col") == 0 || (word.compare(0, 4, "tile") == 0 && word != "tile"))
      lowering.unsupported();
  if (statement.has("cp_mask") || statement.has("ignore_oob")) lowering.unsupported();
  if (statement.has("tensor"))
    lower_tensor_copy(lowering, statement, info, statement.has("mbarrier::complete_tx::bytes"),
                      reduces);
  else
    lower_linear_copy(lowering, statement, info, reduces);
}

static void lower_bulk_commit(Lowering& lowering, const Statement&) {
  lowering.kernel.uses_bulk = true;
  lowering.emit(execute_bulk_commit, kClassTma, {}, 0);
}

static void lower_bulk_wait(Lowering& lowering, const Statement& statement) {
  lowering.kernel.uses_bulk = true;
  lowering.emit(execute_bulk_wait, kClassTma, {}, 0).imm = (u32)statement.operands[0].bits;
}

static void lower_st_async(Lowering& lowering, const Statement& statement) {
  auto* info = new BulkInfo;
  Type type = lowering.last_type();
  int vector = statement.has("v2") ? 2 : statement.has("v4") ? 4 : 1;
  i32 address = lowering.address_base(statement.operands[0], kShared, info->destination_offset),
      barrier = lowering.address_base(statement.operands[2], kShared, info->barrier_offset);
  info->wide_destination = lowering.slot_of(address) == 8;
  info->wide_barrier = lowering.slot_of(barrier) == 8;
  std::vector<i32> ids{address, barrier};
  auto values = elements_of(statement.operands[1]);
  for (auto& value : values) ids.push_back(lowering.source(value, type));
  Instruction& instruction = lowering.emit(execute_st_async, kClassTma, ids, 0);
  instruction.aux = info;
  instruction.type = (u8)type_bytes(type);
  instruction.vector = (u8)vector;
}

static const Opcodes kOpcodes{{"cp.async.bulk", lower_bulk_copy},
                              {"cp.reduce.async.bulk", lower_bulk_copy},
                              {"cp.async.bulk.commit_group", lower_bulk_commit},
                              {"cp.async.bulk.wait_group", lower_bulk_wait},
                              {"st.async", lower_st_async}};
}  // namespace ptxsim
