// Entry points of the simulator itself.
#include "runtime/runtime.h"

using namespace ptxsim;

// Makes a host buffer (numpy, torch CPU tensor) accessible to kernels, with exact bounds.
API int ptxsim_register_host(void* address, size_t bytes) {
  return memory_register(address, bytes, "registered host") ? 0 : 1;
}
API int ptxsim_register_host_readonly(void* address, size_t bytes) {
  return memory_register(address, bytes, "registered read-only host", true) ? 0 : 1;
}
API int ptxsim_unregister_host(void* address) { return memory_unregister(address) ? 0 : 1; }
API const char* ptxsim_last_message() { return last_message().c_str(); }
API void ptxsim_reset() { reset_errors(); }  // clears a sticky error
API int ptxsim_version() { return 1; }

// Reads the PTXSIM_* variables again, before the first call of CUDA: for forks of a process that
// has allocated memory.
API void ptxsim_read_environment() {
  read_options_again();
  read_architecture_again();
}

static bool read_file(const char* path, std::string& text) {
  FILE* file = fopen(path, "rb");
  if (!file) {
    perror(path);
    return false;
  }
  char buffer[65536];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
  fclose(file);
  return true;
}

// Prints what a kernel lowers to. Returns false when it holds something that is not supported.
static bool list_lowered(LoadedModule& loaded, const std::string& name) {
  try {
    auto kernel =
        lower_kernel(*loaded.module, name, loaded.data, architecture().compute_capability);
    printf(", %zu instructions, %u bytes of registers per lane, %u static shared, %u local",
           kernel->code.size(), kernel->register_bytes / 32, kernel->static_shared,
           kernel->local_bytes);
    return true;
  } catch (SimError& error) {
    printf("\n    NOT SUPPORTED: %s", error.what());
    return false;
  }
}

static bool list_kernel(LoadedModule& loaded, const std::string& name, bool lower) {
  const Function& function = loaded.module->functions[name];
  const u32 *most = function.maxntid, *cluster = function.cluster;
  printf("%s\n    %s\n", name.c_str(), demangle(name).c_str());
  printf("    %zu statements, %zu parameters", function.statements.size(), function.params.size());
  if (most[0]) printf(", maxntid %u,%u,%u", most[0], most[1], most[2]);
  if (cluster[0]) printf(", cluster %u,%u,%u", cluster[0], cluster[1], cluster[2]);
  bool supported = !lower || list_lowered(loaded, name);
  printf("\n");
  return supported;
}

// Lists the kernels of a PTX file; lower != 0: also lowers them and says what is not supported.
// Returns the number of failures.
API int ptxsim_list_ptx(const char* path, int lower) {
  LoadedModule loaded;
  if (!read_file(path, loaded.ptx)) return 1;
  int failures = 0;
  try {
    loaded.load();
    const Module& module = *loaded.module;
    printf("%s: target %s, PTX %d.%d, %zu kernels\n", path, module.target.c_str(),
           module.version / 10, module.version % 10, module.entry_order.size());
    for (auto& name : module.entry_order) failures += !list_kernel(loaded, name, lower);
  } catch (SimError& error) {
    fprintf(stderr, "ptxsim: %s\n", error.what());
    return 1;
  }
  return failures;
}
