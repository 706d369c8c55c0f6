// Special registers: names and values.
#include <utility>

#include "instructions/handlers.h"
#include "instructions/moves.h"

namespace ptxsim {
namespace {
enum Axes : u8 { kScalar = 1, kXyz = 3 };

struct Value {
  Handler read;
  u8 slot;  // bytes
};
// The code of a register is 4 * its row in the table below + its axis.
struct SpecialRegister {
  const char* name;
  Axes axes;
  Value value;
};

int axis_of(const Instruction& instruction) { return (int)(instruction.imm & 3); }

template <auto F>
void read_of_warp(Warp& warp, const Instruction& instruction, u32 lanes) {
  auto value = F(warp, axis_of(instruction));
  auto* destination = warp.destination<decltype(value)>(instruction.operands[0]);
  for_each_lane(lanes, [&](int lane) { destination[lane] = value; });
}
template <auto F>
void read_of_lane(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  int axis = axis_of(instruction);
  for_each_lane(lanes, [&](int lane) { destination[lane] = F(warp, axis, lane); });
}
// The same in all lanes: F(warp, axis) is a u32 or a u64.
template <auto F>
constexpr Value of_warp = {read_of_warp<F>, sizeof(F(std::declval<const Warp&>(), 0))};
// Another in each lane: F(warp, axis, lane) is a u32.
template <auto F>
constexpr Value of_lane = {read_of_lane<F>, 4};

const LaunchParams& params(const Warp& warp) { return warp.launch->params; }
u32 cluster_size(const Warp& warp, int) {
  const u32* size = params(warp).cluster;
  return size[0] * size[1] * size[2];
}
// Time is the number of instructions that the worker has executed.
u32 time_low(const Warp& warp, int) { return (u32)warp.worker->sequence; }
u32 time_high(const Warp& warp, int) { return (u32)(warp.worker->sequence >> 32); }
u64 time_all(const Warp& warp, int) { return warp.worker->sequence; }
u32 shared_begin(const Warp& warp, int) { return warp.cta->shared_begin; }
u32 zero(const Warp&, int) { return 0; }

void read_is_explicit_cluster(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32 value = cluster_size(warp, 0) > 1 ? kFullMask : 0;
  write_predicate(warp, instruction.operands[0], value, lanes);
}

constexpr SpecialRegister kSpecialRegisters[] = {
    {"%tid", kXyz,
     of_lane<[](const Warp& warp, int axis, int lane) { return warp.tid[axis][lane]; }>},
    {"%ntid", kXyz, of_warp<[](const Warp& warp, int axis) { return params(warp).block[axis]; }>},
    {"%ctaid", kXyz, of_warp<[](const Warp& warp, int axis) { return warp.cta->id[axis]; }>},
    {"%nctaid", kXyz, of_warp<[](const Warp& warp, int axis) { return params(warp).grid[axis]; }>},
    {"%cluster_ctaid", kXyz,
     of_warp<[](const Warp& warp, int axis) { return warp.cta->cluster_rank[axis]; }>},
    {"%cluster_nctaid", kXyz,
     of_warp<[](const Warp& warp, int axis) { return params(warp).cluster[axis]; }>},
    {"%clusterid", kXyz,
     of_warp<[](const Warp& warp, int axis) { return warp.cta->cluster->id[axis]; }>},
    {"%nclusterid", kXyz,
     of_warp<[](const Warp& warp, int axis) { return warp.launch->cluster_count[axis]; }>},
    {"%cluster_ctarank", kScalar, of_warp<[](const Warp& warp, int) { return warp.cta->rank; }>},
    {"%cluster_nctarank", kScalar, of_warp<cluster_size>},
    {"%is_explicit_cluster", kScalar, {read_is_explicit_cluster, 4}},

    {"%laneid", kScalar, of_lane<[](const Warp&, int, int lane) { return (u32)lane; }>},
    {"%lanemask_eq", kScalar, of_lane<[](const Warp&, int, int lane) { return 1u << lane; }>},
    {"%lanemask_le", kScalar, of_lane<[](const Warp&, int, int lane) { return (2u << lane) - 1; }>},
    {"%lanemask_lt", kScalar, of_lane<[](const Warp&, int, int lane) { return (1u << lane) - 1; }>},
    {"%lanemask_ge", kScalar,
     of_lane<[](const Warp&, int, int lane) { return ~((1u << lane) - 1); }>},
    {"%lanemask_gt", kScalar,
     of_lane<[](const Warp&, int, int lane) { return ~((2u << lane) - 1); }>},

    {"%warpid", kScalar, of_warp<[](const Warp& warp, int) { return (u32)warp.id; }>},
    {"%nwarpid", kScalar,
     of_warp<[](const Warp& warp, int) { return (u32)warp.cta->warps.size(); }>},
    {"%smid", kScalar,
     of_warp<[](const Warp& warp, int) { return warp.cta->linear % (u32)architecture().sms; }>},
    {"%nsmid", kScalar, of_warp<[](const Warp&, int) { return (u32)architecture().sms; }>},
    {"%gridid", kScalar, of_warp<[](const Warp&, int) { return (u64)1; }>},

    {"%clock", kScalar, of_warp<time_low>},
    {"%clock_hi", kScalar, of_warp<time_high>},
    {"%clock64", kScalar, of_warp<time_all>},
    {"%globaltimer", kScalar, of_warp<time_all>},
    {"%globaltimer_lo", kScalar, of_warp<time_low>},
    {"%globaltimer_hi", kScalar, of_warp<time_high>},

    {"%dynamic_smem_size", kScalar,
     of_warp<[](const Warp& warp, int) { return params(warp).dynamic_shared; }>},
    {"%total_smem_size", kScalar,
     of_warp<[](const Warp& warp, int) { return warp.cta->shared_end - warp.cta->shared_begin; }>},
    {"%aggr_smem_size", kScalar,
     of_warp<[](const Warp& warp, int) { return warp.cta->shared_end; }>},
    {"%reserved_smem_offset_begin", kScalar, of_warp<zero>},
    {"%reserved_smem_offset_end", kScalar, of_warp<shared_begin>},
    {"%reserved_smem_offset_cap", kScalar, of_warp<shared_begin>},

    // The workspace of grid-wide barriers.
    {"%envreg1", kScalar,
     of_warp<[](const Warp& warp, int) { return (u32)(warp.launch->grid_workspace >> 32); }>},
    {"%envreg2", kScalar,
     of_warp<[](const Warp& warp, int) { return (u32)warp.launch->grid_workspace; }>},
    {"%envreg", kScalar, of_warp<zero>},  // with any other number
    {"%pm", kScalar, of_warp<zero>},      // performance counters: with any number
};

std::unordered_map<std::string, int> codes_by_name() {
  std::unordered_map<std::string, int> codes;
  int row = 0;
  for (const SpecialRegister& entry : kSpecialRegisters) {
    if (entry.axes == kScalar)
      codes[entry.name] = 4 * row;
    else
      for (int axis = 0; axis < 3; axis++)
        codes[std::string(entry.name) + "." + "xyz"[axis]] = 4 * row + axis;
    row++;
  }
  return codes;
}
}  // namespace

int special_register_code(const std::string& name, u8& slot) {
  static const std::unordered_map<std::string, int> codes = codes_by_name();
  slot = 4;
  auto found = codes.find(name);
  for (const char* numbered : {"%envreg", "%pm"})
    if (found == codes.end() && name.starts_with(numbered)) found = codes.find(numbered);
  if (found == codes.end()) return -1;
  slot = kSpecialRegisters[found->second / 4].value.slot;
  return found->second;
}

void execute_sreg(Warp& warp, const Instruction& instruction, u32 lanes) {
  kSpecialRegisters[instruction.imm / 4].value.read(warp, instruction, lanes);
}
}  // namespace ptxsim
