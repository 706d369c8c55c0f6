// Entry points of the driver by name.
#include <dlfcn.h>

#include "runtime/runtime.h"

using namespace ptxsim;

// Headers ask for cuCtxCreate where the library exports cuCtxCreate_v2.
void* ptxsim::find_versioned_symbol(void* library, const std::string& name) {
  void* address = dlsym(library, name.c_str());
  for (const char* version : {"_v2", "_v3"})
    if (!address) address = dlsym(library, (name + version).c_str());
  return address;
}
void* ptxsim::own_library() {
  Dl_info info;
  if (!dladdr((void*)&cudaGetDriverEntryPointByVersion, &info)) return nullptr;
  return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* status) {
  void* address = find_versioned_symbol(RTLD_DEFAULT, symbol);
  if (!address)  // this library may have been loaded with RTLD_LOCAL
    if (void* library = own_library()) address = find_versioned_symbol(library, symbol);
  *function = address;
  if (status) *status = address ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (!address) fprintf(stderr, "ptxsim: driver entry point %s is not provided\n", symbol);
  return address || status ? cudaSuccess : runtime_error(cudaErrorSymbolNotFound);
}
API cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function,
                                        unsigned long long flags,
                                        cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, status);
}

PER_THREAD_STREAM(cudaGetDriverEntryPointByVersion);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
PER_THREAD_STREAM(cudaGetDriverEntryPoint);
#pragma GCC diagnostic pop
