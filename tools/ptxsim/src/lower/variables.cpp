// Where variables stand: in local memory, in shared memory, or where the module was loaded to.
#include <algorithm>

#include "lower/lowering.h"

namespace ptxsim {
Lowering::Location Lowering::local_location(u64 size, u32 align) {
  const u32 address = round_up(kernel.local_bytes, align);
  kernel.local_bytes = address + (u32)size;
  return {kLocal, address, size};
}

// The place of a shared variable, which all calls of its function share; key: its unique name.
Lowering::Location Lowering::shared_location(const std::string& key, const Variable& variable,
                                             const std::string& shown_name) {
  auto known = shared_locations.find(key);
  if (known != shared_locations.end()) return known->second;
  shared_top = round_up(shared_top, variable.align);
  const Location location{kShared, shared_top, variable.size};
  shared_top += (u32)variable.size;
  kernel.shared_variables.push_back({shown_name, (u32)location.address, (u32)location.size});
  return shared_locations[key] = location;
}

// Gives a variable of the current function its place.
void Lowering::place_variable(const Variable& variable) {
  const std::string key = frame->function->name + "/" + variable.name;
  Location& location = frame->variables[variable.name];
  if (variable.space == kLocal || variable.space == kParam) {
    location = local_location(variable.size, std::max<u32>(variable.align, 8));
  } else if (variable.space == kShared) {
    if (variable.unsized_extern) fail("extern shared arrays inside functions are not supported");
    location = shared_location(key, variable, variable.name.substr(0, variable.name.find('$')));
  } else {
    auto loaded = module_data.addresses.find(key);
    if (loaded == module_data.addresses.end()) {
      current = nullptr;
      fail("internal: function-scope global without storage");
    }
    location = {variable.space, loaded->second, variable.size};
  }
}

// Looks a name up in the function, then in the module. Returns false when no variable has it.
bool Lowering::symbol_address(const std::string& name, Space& space, u64& address) {
  auto own = frame->variables.find(name);
  if (own != frame->variables.end()) {
    space = own->second.space;
    address = own->second.address;
    return true;
  }
  auto variable = module.variables.find(name);
  auto loaded = module_data.addresses.find(name);
  if (loaded != module_data.addresses.end()) {
    space = variable != module.variables.end() ? variable->second.space : kGlobal;
    address = loaded->second;
    return true;
  }
  if (variable == module.variables.end() || variable->second.space != kShared) return false;
  space = kShared;
  address = shared_location(name, variable->second, name).address;
  return true;
}
}  // namespace ptxsim
