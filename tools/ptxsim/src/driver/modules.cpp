// Modules, functions, launches, and entry points by name.
#include "driver/driver.h"
#include "load/fatbin.h"

using namespace ptxsim;

API CUresult cuModuleLoadData(CUmodule* result, const void* image) {
  auto module = std::make_unique<LoadedModule>();
  if (*(const u32*)image == kFatBinaryMagic)
    module->fat_binary = image;
  else
    module->ptx = (const char*)image;
  try {
    module->load();
  } catch (SimError& error) {
    fprintf(stderr, "ptxsim: %s\n", error.what());
    return CUDA_ERROR_INVALID_PTX;
  }
  *result = (CUmodule)module.release();
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* result, const void* image, unsigned, CUjit_option*,
                                void**) {
  return cuModuleLoadData(result, image);
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  auto* module = (LoadedModule*)handle;
  auto found = module->module->functions.find(name);
  if (found == module->module->functions.end() || !found->second.is_entry)
    return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)module->get(name);
  return CUDA_SUCCESS;
}
API CUresult cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, CUmodule handle,
                                  const char* name) {
  auto* module = (LoadedModule*)handle;
  auto found = module->data.addresses.find(name);
  if (found == module->data.addresses.end()) return CUDA_ERROR_NOT_FOUND;
  if (address) *address = found->second;
  if (bytes) *bytes = (size_t)module->module->variables[name].size;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  auto* handle = (KernelHandle*)function;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > architecture().shared_bytes_optin) return CUDA_ERROR_INVALID_VALUE;
    handle->max_dynamic_shared = value;
  } else if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    handle->non_portable_cluster = value;
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  auto* handle = (KernelHandle*)function;
  if (int error = prepare_kernel(handle)) return driver_error(error);
  *value = attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? (int)handle->kernel->static_shared
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS        ? handle->kernel->register_estimate
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                              void** extra) {
  if (extra) return CUDA_ERROR_NOT_SUPPORTED;
  LaunchRequest request{{config->gridDimX, config->gridDimY, config->gridDimZ},
                        {config->blockDimX, config->blockDimY, config->blockDimZ}};
  request.dynamic_shared = config->sharedMemBytes;
  request.arguments = arguments;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttributeValue& value = config->attrs[i].value;
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      request.cluster[0] = value.clusterDim.x;
      request.cluster[1] = value.clusterDim.y;
      request.cluster[2] = value.clusterDim.z;
    } else if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
      request.cooperative = value.cooperative;
  }
  return driver_error(launch_kernel((KernelHandle*)function, request));
}
API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z,
                            unsigned shared_bytes, CUstream, void** arguments, void** extra) {
  CUlaunchConfig config{};
  config.gridDimX = grid_x;
  config.gridDimY = grid_y;
  config.gridDimZ = grid_z;
  config.blockDimX = block_x;
  config.blockDimY = block_y;
  config.blockDimZ = block_z;
  config.sharedMemBytes = shared_bytes;
  return cuLaunchKernelEx(&config, function, arguments, extra);
}

API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* status) {
  void* library = own_library();
  *function = library ? find_versioned_symbol(library, symbol) : nullptr;
  if (status)
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function || status ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
