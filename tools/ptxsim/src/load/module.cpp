#include "load/module.h"

#include "load/fatbin.h"

namespace ptxsim {
// Storage of a global or constant variable.
void LoadedModule::allocate(const std::string& key, const Variable& variable) {
  if (variable.space != kGlobal && variable.space != kConst) return;
  if (variable.is_extern && variable.init.empty() && variable.size == 0) return;
  // The registry keeps the pointer to the name, as long as the program runs.
  auto* kind = new std::string((variable.space == kConst ? "__constant__ " : "__device__ ") +
                               demangle(variable.name.empty() ? key : variable.name));
  void* address = memory_allocate(variable.size, kind->c_str());
  memset(address, 0, variable.size);
  if (!variable.init.empty())
    memcpy(address, variable.init.data(), std::min<size_t>(variable.size, variable.init.size()));
  data.addresses[key] = (u64)address;
}

// Writes the addresses that the initial value of a variable holds.
void LoadedModule::relocate(const std::string& key, const Variable& variable) {
  for (auto& relocation : variable.relocations) {
    auto found = data.addresses.find(relocation.symbol);
    if (found == data.addresses.end()) continue;  // function pointers and the like: left null
    u64 address = found->second + (u64)relocation.addend;
    memcpy((u8*)data.addresses[key] + relocation.offset, &address, relocation.size);
  }
}

void LoadedModule::load() {
  if (loaded) return;
  if (!load_error.empty()) throw SimError(kErrorLoad, load_error);
  try {
    std::string which = "PTX image", text = ptx;
    if (fat_binary) text = fatbin_pick_ptx(fat_binary, architecture().compute_capability, which);
    module = parse_ptx(text, "embedded PTX (" + which + ")");
    for (auto& name : module->variable_order) allocate(name, module->variables[name]);
    for (auto& [name, function] : module->functions)
      for (auto& variable : function.variables) allocate(name + "/" + variable.name, variable);
    for (auto& name : module->variable_order)
      if (data.addresses.count(name)) relocate(name, module->variables[name]);
    loaded = true;
  } catch (SimError& error) {
    load_error = error.what();
    throw;
  }
}

KernelHandle* LoadedModule::get(const std::string& name) {
  auto& handle = kernels[name];
  if (!handle) {
    handle = std::make_unique<KernelHandle>();
    handle->module = this;
    handle->name = name;
  }
  return handle.get();
}
}  // namespace ptxsim
