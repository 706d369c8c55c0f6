// Allocations, host registrations and what a pointer points to.
#include "runtime/runtime.h"

using namespace ptxsim;

API cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (cudaError_t error = sticky_runtime_error()) return runtime_error(error);
  if (!address) return runtime_error(cudaErrorInvalidValue);
  *address = bytes ? memory_allocate(bytes, "cudaMalloc") : nullptr;
  return *address || !bytes ? cudaSuccess : runtime_error(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void* address) {
  if (!address) return runtime_error(sticky_error());
  if (!memory_free(address)) {
    fprintf(stderr, "ptxsim: cudaFree(%p): not an allocation (or freed twice)\n", address);
    return runtime_error(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}
API cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
API cudaError_t cudaMallocFromPoolAsync(void** address, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(address, bytes);
}
API cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) {
  *address = bytes ? memory_allocate(bytes, "cudaMallocManaged") : nullptr;
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** address, size_t bytes) {
  *address = bytes ? memory_allocate(bytes, "cudaMallocHost") : nullptr;
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return cudaMallocHost(address, bytes);
}
API cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }
API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  return memory_register(address, bytes, "cudaHostRegister") ? cudaSuccess
                                                             : runtime_error(cudaErrorInvalidValue);
}
API cudaError_t cudaHostUnregister(void* address) {
  return memory_unregister(address) ? cudaSuccess : runtime_error(cudaErrorInvalidValue);
}
API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
API cudaError_t cudaHostGetFlags(unsigned* flags, void*) {
  *flags = 0;
  return cudaSuccess;
}
API cudaError_t cudaMallocPitch(void** address, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return cudaMalloc(address, *pitch * height);
}
API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = 64ull << 30;
  *free_bytes = *total_bytes - memory_total();
  return cudaSuccess;
}
static cudaMemoryType memory_type(const std::string& kind) {
  if (kind == "cudaMallocHost" || kind == "cudaHostRegister") return cudaMemoryTypeHost;
  return kind == "cudaMallocManaged" ? cudaMemoryTypeManaged : cudaMemoryTypeDevice;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->hostPointer = (void*)pointer;
  attributes->type = cudaMemoryTypeUnregistered;
  Allocation allocation;
  if (memory_find(pointer, allocation)) {
    attributes->type = memory_type(allocation.kind);
    attributes->devicePointer = (void*)pointer;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}
API cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* result, int) {
  static int pool;
  *result = (cudaMemPool_t)&pool;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
  return cudaDeviceGetDefaultMemPool(pool, device);
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

PER_THREAD_STREAM(cudaMemPrefetchAsync);
PER_THREAD_STREAM(cudaMallocAsync);
PER_THREAD_STREAM(cudaFreeAsync);
PER_THREAD_STREAM(cudaMallocFromPoolAsync);
