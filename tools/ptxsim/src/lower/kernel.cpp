// A kernel of a module, lowered.
#include <algorithm>

#include "lower/lowering.h"

namespace ptxsim {
std::string Kernel::where(u32 pc) const {
  if (pc >= code.size()) return "";
  const Instruction& instruction = code[pc];
  std::string place = format("PTX line %u", instruction.line);
  auto after = std::upper_bound(labels.begin(), labels.end(), pc,
                                [](u32 pc, const auto& label) { return pc < label.first; });
  if (after != labels.begin()) {
    const auto& [label_pc, label] = after[-1];
    place += format(" (%s+%u)", label.c_str(), pc - label_pc);
  }
  if (instruction.source_line) {
    auto file = module->files.find(instruction.source_file);
    place += format(" %s:%u", file == module->files.end() ? "?" : file->second.c_str(),
                    instruction.source_line);
  }
  if (instruction.statement) place += " `" + instruction.statement->text + "`";
  return place;
}

namespace {
// The variables of dynamic shared memory, which all begin where the static ones end.
struct DynamicShared {
  std::vector<std::string> names;
  u32 align = 16;

  explicit DynamicShared(const Module& module) {
    for (const auto& [name, variable] : module.variables) {
      if (variable.space != kShared || !(variable.unsized_extern || variable.is_extern)) continue;
      names.push_back(name);
      align = std::max(align, variable.align);
    }
  }
};

struct LoweredKernel {
  std::unique_ptr<Kernel> kernel;
  std::unique_ptr<Lowering> lowering;
};
}  // namespace

static const Function& entry_function(const Module& module, const std::string& name) {
  auto found = module.functions.find(name);
  if (found == module.functions.end() || !found->second.is_entry || !found->second.has_body)
    throw SimError(kErrorLoad, "no kernel " + name + " in " + module.source);
  return found->second;
}

// Lays out the parameters one after the other.
static void place_parameters(const Function& function, Kernel& kernel, Lowering::Frame& frame) {
  for (const Variable& parameter : function.params) {
    const u32 offset = round_up(kernel.param_bytes, parameter.align);
    kernel.params.push_back({offset, (u32)parameter.size});
    frame.variables[parameter.name] = {kParam, offset, parameter.size};
    kernel.param_bytes = offset + (u32)parameter.size;
  }
}

// Lowers a kernel, up to the allocation of registers, with dynamic shared memory at an address.
static LoweredKernel lower(const Module& module, const Function& function, ModuleData& data,
                           const DynamicShared& dynamic, u32 dynamic_begin) {
  // sm_80 and later reserve the first bytes of shared memory for the system.
  constexpr u32 kReservedShared = 1024;
  auto kernel = std::make_unique<Kernel>();
  kernel->name = function.name;
  kernel->module = &module;
  kernel->function = &function;
  kernel->shared_begin = kReservedShared;
  auto lowering = std::make_unique<Lowering>(module, data, *kernel);
  lowering->shared_top = kernel->shared_begin;
  for (const std::string& name : dynamic.names)
    lowering->shared_locations[name] = {kShared, dynamic_begin, 0};
  Lowering::Frame frame;
  place_parameters(function, *kernel, frame);
  lowering->lower_function(function, frame);
  return {std::move(kernel), std::move(lowering)};
}

std::unique_ptr<Kernel> lower_kernel(const Module& module, const std::string& name,
                                     ModuleData& data, int compute_capability) {
  const Function& function = entry_function(module, name);
  const DynamicShared dynamic(module);
  LoweredKernel lowered = lower(module, function, data, dynamic, 0);
  u32 static_end = lowered.lowering->shared_top;
  if (!dynamic.names.empty()) {
    // The code holds the address of dynamic shared memory, which is known only now.
    static_end = round_up(static_end, dynamic.align);
    lowered = lower(module, function, data, dynamic, static_end);
  }
  Kernel& kernel = *lowered.kernel;
  kernel.static_shared = static_end - kernel.shared_begin;
  kernel.compute_capability = compute_capability;
  kernel.local_bytes = round_up(kernel.local_bytes, 16);
  lowered.lowering->allocate_registers();
  return std::move(lowered.kernel);
}
}  // namespace ptxsim
