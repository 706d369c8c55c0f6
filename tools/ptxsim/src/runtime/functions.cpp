// Kernels as functions: handles, attributes and occupancy.
#include <algorithm>

#include "runtime/runtime.h"

using namespace ptxsim;

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return runtime_error(cudaErrorInvalidDeviceFunction);
  *kernel = (cudaKernel_t)handle;
  return cudaSuccess;
}
API cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return __cudaGetKernel(kernel, function);
}
API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* result, const void* symbol) {
  return __cudaGetKernel((cudaKernel_t*)result, symbol);
}
API cudaError_t cudaFuncGetName(const char** name, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return runtime_error(cudaErrorInvalidDeviceFunction);
  *name = handle->name.c_str();
  return cudaSuccess;
}

static cudaError_t set_max_dynamic_shared(KernelHandle* handle, int bytes) {
  if (prepare_kernel(handle)) return (cudaError_t)take_last_error(false);
  u32 static_shared = handle->kernel->static_shared;
  if (bytes < 0 || bytes + (int)static_shared > architecture().shared_bytes_optin) {
    fprintf(stderr,
            "ptxsim: cudaFuncSetAttribute: %d bytes of dynamic shared memory (+ %u static) "
            "exceed the %d of %s\n",
            bytes, static_shared, architecture().shared_bytes_optin, architecture().name.c_str());
    return runtime_error(cudaErrorInvalidValue);
  }
  handle->max_dynamic_shared = bytes;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return runtime_error(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    return set_max_dynamic_shared(handle, value);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed)
    handle->non_portable_cluster = value;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
API cudaError_t cudaFuncSetSharedMemConfig(const void*, cudaSharedMemConfig) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return runtime_error(cudaErrorInvalidDeviceFunction);
  if (int error = prepare_kernel(handle)) return runtime_error(error);
  const Kernel& kernel = *handle->kernel;
  const u32* max_threads = kernel.function->maxntid;
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = kernel.static_shared;
  attributes->localSizeBytes = kernel.local_bytes;
  attributes->numRegs = kernel.register_estimate;
  attributes->maxThreadsPerBlock =
      max_threads[0] ? (int)(max_threads[0] * max_threads[1] * max_threads[2]) : 1024;
  attributes->ptxVersion = attributes->binaryVersion = architecture().compute_capability;
  attributes->maxDynamicSharedSizeBytes = handle->max_dynamic_shared >= 0
                                              ? handle->max_dynamic_shared
                                              : 48 * 1024 - (int)kernel.static_shared;
  attributes->preferredShmemCarveout = -1;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* count, const void* function, int block_size, size_t dynamic_shared, unsigned) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return runtime_error(cudaErrorInvalidDeviceFunction);
  int blocks = max_active_blocks(handle, block_size, dynamic_shared);
  if (blocks < 0) return (cudaError_t)take_last_error(false);
  *count = blocks;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* function,
                                                              int block_size,
                                                              size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, block_size,
                                                                dynamic_shared, 0);
}
API cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* function,
                                               const cudaLaunchConfig_t* config) {
  int blocks_per_sm = 0;
  const dim3& block = config->blockDim;
  if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks_per_sm, function, (int)(block.x * block.y * block.z), config->dynamicSmemBytes))
    return error;
  unsigned cluster_size = 1;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      cluster_size =
          attribute.val.clusterDim.x * attribute.val.clusterDim.y * attribute.val.clusterDim.z;
  }
  *count = cluster_size ? blocks_per_sm * architecture().sms / (int)cluster_size : 0;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*,
                                                     const cudaLaunchConfig_t*) {
  *size = architecture().max_cluster;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* function,
                                                          int block_count, int) {
  KernelHandle* handle = find_kernel(function);
  if (!handle || prepare_kernel(handle)) return runtime_error(cudaErrorInvalidDeviceFunction);
  i64 share = architecture().shared_bytes_per_sm / std::max(block_count, 1) - 1024 -
              (int)handle->kernel->static_shared;
  *bytes = (size_t)std::max<i64>(0, std::min<i64>(share, architecture().shared_bytes_optin));
  return cudaSuccess;
}
