// Modules that have been loaded, and the kernels in them.
#pragma once
#include "exec.h"

namespace ptxsim {
struct LoadedModule;
struct KernelHandle {
  LoadedModule* module = nullptr;
  std::string name;
  std::unique_ptr<Kernel> kernel;  // null until it is first needed
  int max_dynamic_shared = -1;     // cudaFuncAttributeMaxDynamicSharedMemorySize; -1: not set
  bool non_portable_cluster = false;
  u32 required_cluster[3] = {0, 0, 0};
};

struct LoadedModule {
  const void* fat_binary = nullptr;
  std::string ptx;  // where there is no fat binary
  std::unique_ptr<Module> module;
  ModuleData data;
  std::map<std::string, std::unique_ptr<KernelHandle>> kernels;
  std::string load_error;
  bool loaded = false;

  void load();  // parses the PTX the first time; throws SimError
  KernelHandle* get(const std::string& name);

 private:
  void allocate(const std::string& key, const Variable& variable);
  void relocate(const std::string& key, const Variable& variable);
};
}  // namespace ptxsim
