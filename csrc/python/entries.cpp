#include "python/entries.h"

#include <dlfcn.h>

#include <stdexcept>

namespace sqk {

Entries own_entries() {
  return {&sqk_gemm_table,        &sqk_gemm_is_excluded,   &sqk_gemm_plan,      &sqk_device,
          &sqk_gemm_use_measured, &sqk_gemm_without_tiles, &sqk_quantize_rules, &sqk_quantize_plan};
}

Entries entries_of(const std::string& library) {
  // Loaded locally, as by torch and ctypes, so loading the same library again finds the same copy
  // of its state.
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  Entries found = {};
  const auto find = [&](auto& entry, const char* name) {
    void* const address = dlsym(handle, name);
    if (address == nullptr) throw std::runtime_error(library + " has no " + name);
    entry = reinterpret_cast<std::decay_t<decltype(entry)>>(address);
  };
  find(found.gemm_table, "sqk_gemm_table");
  find(found.gemm_is_excluded, "sqk_gemm_is_excluded");
  find(found.gemm_plan, "sqk_gemm_plan");
  find(found.device, "sqk_device");
  find(found.gemm_use_measured, "sqk_gemm_use_measured");
  find(found.gemm_without_tiles, "sqk_gemm_without_tiles");
  find(found.quantize_rules, "sqk_quantize_rules");
  find(found.quantize_plan, "sqk_quantize_plan");
  return found;
}

}  // namespace sqk
