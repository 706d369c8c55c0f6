// Allocation of the registers of a kernel, and of its constants.
#include <algorithm>

#include "lower/liveness.h"
#include "lower/lowering.h"

namespace ptxsim {
namespace {
constexpr u32 kLanes = 32;
constexpr u32 kMaskBytes = 64;  // a mask of lanes, in a line of its own

// Byte offsets in the register file of a warp.
struct RegisterFile {
  std::vector<i32> offsets;  // of the virtual registers, -1: never live
  u32 bytes = 0;
};
// Byte offsets in the constants of a kernel.
struct ConstantLayout {
  std::vector<u32> offsets;
  u32 bytes = 0;
};
}  // namespace

// PTX is close to SSA, so thousands of virtual registers are live only briefly. A linear scan over
// their live intervals keeps the register file of a warp in cache.
static RegisterFile scan(const std::vector<VirtualRegister>& registers,
                         const std::vector<LiveInterval>& intervals) {
  auto bytes_of = [&](i32 id) {
    return registers[id].is_predicate ? kMaskBytes : kLanes * registers[id].slot;
  };
  std::vector<i32> order;
  for (size_t id = 0; id < registers.size(); id++)
    if (!intervals[id].is_empty()) order.push_back((i32)id);
  std::sort(order.begin(), order.end(),
            [&](i32 left, i32 right) { return intervals[left].first < intervals[right].first; });
  RegisterFile file;
  file.offsets.assign(registers.size(), -1);
  std::map<u32, std::vector<i32>> free_offsets;  // by the size of the place
  std::multimap<u32, i32> active;                // by the end of the interval
  for (i32 id : order) {
    while (!active.empty() && active.begin()->first < intervals[id].first) {
      const i32 ended = active.begin()->second;
      free_offsets[bytes_of(ended)].push_back(file.offsets[ended]);
      active.erase(active.begin());
    }
    std::vector<i32>& free = free_offsets[bytes_of(id)];
    if (free.empty()) {
      file.offsets[id] = (i32)file.bytes;
      file.bytes += bytes_of(id);
    } else {
      file.offsets[id] = free.back();
      free.pop_back();
    }
    active.emplace(intervals[id].last, id);
  }
  return file;
}

static ConstantLayout lay_out(const std::vector<Constant>& constants) {
  ConstantLayout layout;
  for (const Constant& constant : constants) {
    layout.offsets.push_back(layout.bytes);
    layout.bytes += constant.slot ? kLanes * constant.slot : kMaskBytes;
  }
  return layout;
}

// Writes a constant once a lane, as a register holds it.
static void store(const Constant& constant, u8* place) {
  if (!constant.slot) {
    std::fill_n((u32*)place, kMaskBytes / sizeof(u32), (u32)constant.low);
  } else if (constant.slot == 4) {
    std::fill_n((u32*)place, kLanes, (u32)constant.low);
  } else if (constant.slot == 8) {
    std::fill_n((u64*)place, kLanes, constant.low);
  } else {
    for (u32 lane = 0; lane < kLanes; lane++) {
      ((u64*)place)[2 * lane] = constant.low;
      ((u64*)place)[2 * lane + 1] = constant.high;
    }
  }
}

static void store_constants(const std::vector<Constant>& constants, const ConstantLayout& layout,
                            Kernel& kernel) {
  constexpr u64 kAlign = 64;
  kernel.constant_storage.assign(layout.bytes + kAlign, 0);
  u8* begin = (u8*)(((u64)kernel.constant_storage.data() + kAlign - 1) & ~(kAlign - 1));
  kernel.constants = begin;
  for (size_t i = 0; i < constants.size(); i++) store(constants[i], begin + layout.offsets[i]);
}

// Replaces the ids of operands and predicates by offsets.
static void encode_operands(Kernel& kernel, const RegisterFile& file,
                            const ConstantLayout& layout) {
  size_t total = 0;
  for (const Instruction& instruction : kernel.code) total += instruction.operand_ids.size();
  kernel.operand_pool.resize(total);
  i32* next = kernel.operand_pool.data();
  for (Instruction& instruction : kernel.code) {
    instruction.operands = next;
    for (i32 id : instruction.operand_ids)
      *next++ = id >= 0 ? std::max(0, file.offsets[id]) : ~(i32)layout.offsets[-1 - id];
    if (instruction.predicate >= 0) instruction.predicate = file.offsets[instruction.predicate];
    instruction.operand_ids = {};
  }
}

void Lowering::allocate_registers() {
  if (kernel.code.empty()) return;
  const RegisterFile file = scan(registers, live_intervals(kernel.code, registers.size()));
  const ConstantLayout layout = lay_out(constants);
  store_constants(constants, layout, kernel);
  encode_operands(kernel, file, layout);
  kernel.register_bytes = round_up(file.bytes, 64);
  kernel.register_estimate = std::min(255u, file.bytes / 128 + 8);  // 32-bit registers of a thread
}
}  // namespace ptxsim
