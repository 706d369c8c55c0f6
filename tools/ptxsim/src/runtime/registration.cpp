// What the start-up code of nvcc calls: it registers fat binaries, kernels and variables.
#include "runtime/runtime.h"

using namespace ptxsim;

namespace {
struct FatBinaryWrapper {
  int magic, version;
  const void* data;
  void* extra;
};
struct FatBinary {
  LoadedModule module;
  std::map<const void*, std::string> variables;  // host variable -> name on the device
};
struct Registrations {
  std::mutex mutex;
  std::vector<std::unique_ptr<FatBinary>> fat_binaries;
  std::map<const void*, KernelHandle*> by_host;  // host stub -> kernel
  std::map<const void*, KernelHandle*> handles;  // handle -> itself
  std::map<const void*, FatBinary*> variable_owner;
};
// Never freed: programs launch kernels from destructors of static objects.
Registrations& registrations() {
  static Registrations* all = new Registrations;
  return *all;
}
}  // namespace

KernelHandle* ptxsim::find_kernel(const void* function) {
  Registrations& all = registrations();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto stub = all.by_host.find(function);
  if (stub != all.by_host.end()) return stub->second;
  auto handle = all.handles.find(function);
  return handle == all.handles.end() ? nullptr : handle->second;
}

cudaError_t ptxsim::find_symbol(const void* symbol, void** address, size_t* bytes) {
  Registrations& all = registrations();
  FatBinary* owner = nullptr;
  std::string name;
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    auto found = all.variable_owner.find(symbol);
    if (found != all.variable_owner.end()) {
      owner = found->second;
      name = owner->variables[symbol];
    }
  }
  if (!owner) return runtime_error(cudaErrorInvalidSymbol);
  try {
    owner->module.load();
  } catch (SimError& error) {
    fprintf(stderr, "ptxsim: %s\n", error.what());
    return runtime_error(cudaErrorInvalidKernelImage);
  }
  auto found = owner->module.data.addresses.find(name);
  if (found == owner->module.data.addresses.end()) return runtime_error(cudaErrorInvalidSymbol);
  if (address) *address = (void*)found->second;
  if (bytes) *bytes = (size_t)owner->module.module->variables[name].size;
  return cudaSuccess;
}

API void** __cudaRegisterFatBinary(void* wrapper) {
  auto fat_binary = std::make_unique<FatBinary>();
  fat_binary->module.fat_binary = ((FatBinaryWrapper*)wrapper)->data;
  void** handle = (void**)fat_binary.get();
  std::lock_guard<std::mutex> lock(registrations().mutex);
  registrations().fat_binaries.push_back(std::move(fat_binary));
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void** fat_binary, const char* host_function, char*,
                                const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> lock(registrations().mutex);
  KernelHandle* kernel = ((FatBinary*)fat_binary)->module.get(name);
  registrations().by_host[host_function] = kernel;
  registrations().handles[kernel] = kernel;
}
API void __cudaRegisterVar(void** handle, char* host_variable, char*, const char* name, int, size_t,
                           int, int) {
  auto* fat_binary = (FatBinary*)handle;
  std::lock_guard<std::mutex> lock(registrations().mutex);
  fat_binary->variables[host_variable] = name;
  registrations().variable_owner[host_variable] = fat_binary;
}
API void __cudaRegisterManagedVar(void** handle, void** host_variable, char* address,
                                  const char* name, int is_extern, size_t bytes, int is_constant,
                                  int is_global) {
  __cudaRegisterVar(handle, (char*)host_variable, address, name, is_extern, bytes, is_constant,
                    is_global);
}
API void __cudaRegisterTexture(void**, const void*, const void**, const char*, int, int, int) {}
API void __cudaRegisterSurface(void**, const void*, const void**, const char*, int, int) {}
