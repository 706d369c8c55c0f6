// The one device: its properties and attributes.
#include "runtime/runtime.h"

using namespace ptxsim;

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : runtime_error(cudaErrorInvalidDevice);
}
API cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }
API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetValidDevices(int*, int) { return cudaSuccess; }
API cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) {
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return runtime_error(sticky_error()); }
API cudaError_t cudaDeviceReset() {
  reset_errors();
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  snprintf(id, (size_t)size, "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can_access, int, int) {
  *can_access = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) {
  *value = 8 << 20;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device) return runtime_error(cudaErrorInvalidDevice);
  const Architecture& model = architecture();
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "ptxsim %s", model.name.c_str());
  properties->totalGlobalMem = 64ull << 30;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = (size_t)model.shared_bytes_optin;
  properties->sharedMemPerMultiprocessor = (size_t)model.shared_bytes_per_sm;
  properties->reservedSharedMemPerBlock = 1024;
  properties->regsPerBlock = properties->regsPerMultiprocessor = model.registers_per_sm;
  properties->warpSize = 32;
  properties->memPitch = 0x7fffffff;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->totalConstMem = 65536;
  properties->major = model.compute_capability / 10;
  properties->minor = model.compute_capability % 10;
  properties->textureAlignment = 512;
  properties->texturePitchAlignment = 32;
  properties->surfaceAlignment = 512;
  properties->multiProcessorCount = model.sms;
  properties->canMapHostMemory = properties->concurrentKernels = properties->unifiedAddressing =
      properties->managedMemory = properties->cooperativeLaunch = 1;
  properties->maxThreadsPerMultiProcessor = model.max_threads_per_sm;
  properties->maxBlocksPerMultiProcessor = model.max_blocks_per_sm;
  properties->memoryBusWidth = 5120;
  properties->l2CacheSize = 50 << 20;
  properties->asyncEngineCount = 1;
  properties->streamPrioritiesSupported = properties->globalL1CacheSupported =
      properties->localL1CacheSupported = 1;
  properties->memoryPoolsSupported = 0;
  properties->clusterLaunch = model.compute_capability >= 90;
  properties->hostRegisterSupported = 1;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}

// Attributes that every architecture has alike.
static const struct {
  int attribute, value;
} kFixedAttributes[] = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 0x7fffffff},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 * 1024},
    {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
    {cudaDevAttrTotalConstantMemory, 65536},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrClockRate, 1500000},
    {cudaDevAttrMemoryClockRate, 2000000},
    {cudaDevAttrL2CacheSize, 50 << 20},
    {cudaDevAttrGlobalMemoryBusWidth, 5120},
    {cudaDevAttrConcurrentKernels, 1},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrCooperativeLaunch, 1},
    {cudaDevAttrManagedMemory, 1},
    {cudaDevAttrCanMapHostMemory, 1},
    {cudaDevAttrStreamPrioritiesSupported, 1},
    {cudaDevAttrHostRegisterSupported, 1},
    {cudaDevAttrGpuOverlap, 1},
    {cudaDevAttrAsyncEngineCount, 1},
};
constexpr int kTensorMapAccess = 128;  // CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED

// cudaDeviceAttr and CUdevice_attribute share their numbers.
int ptxsim::device_attribute(int attribute) {
  const Architecture& model = architecture();
  switch (attribute) {
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return model.registers_per_sm;
    case cudaDevAttrMultiProcessorCount:
      return model.sms;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return model.max_threads_per_sm;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return model.max_blocks_per_sm;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return model.shared_bytes_per_sm;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return model.shared_bytes_optin;
    case cudaDevAttrComputeCapabilityMajor:
      return model.compute_capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return model.compute_capability % 10;
    case cudaDevAttrClusterLaunch:
    case kTensorMapAccess:
      return model.compute_capability >= 90;
  }
  for (auto& fixed : kFixedAttributes)
    if (fixed.attribute == attribute) return fixed.value;
  return 0;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device) return runtime_error(cudaErrorInvalidDevice);
  *value = device_attribute(attribute);
  return cudaSuccess;
}
