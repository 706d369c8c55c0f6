// Allocations, copies and fills.
#include "driver/driver.h"

using namespace ptxsim;

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute,
                                   CUdeviceptr pointer) {
  Allocation allocation;
  if (!memory_find((void*)pointer, allocation)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *(unsigned*)value = CU_MEMORYTYPE_DEVICE;
  else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
    *(int*)value = 0;
  else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)value = pointer;
  else
    return CUDA_ERROR_NOT_SUPPORTED;
  return CUDA_SUCCESS;
}
API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  *address = (CUdeviceptr)memory_allocate(bytes, "cudaMalloc");
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemFree_v2(CUdeviceptr address) {
  return memory_free((void*)address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuMemcpyHtoD_v2(CUdeviceptr destination, const void* source, size_t bytes) {
  memmove((void*)destination, source, bytes);
  memory_copy_init((void*)destination, source, bytes);
  return CUDA_SUCCESS;
}
API CUresult cuMemcpyDtoH_v2(void* destination, CUdeviceptr source, size_t bytes) {
  memmove(destination, (void*)source, bytes);
  return CUDA_SUCCESS;
}
API CUresult cuMemcpyDtoD_v2(CUdeviceptr destination, CUdeviceptr source, size_t bytes) {
  memmove((void*)destination, (void*)source, bytes);
  memory_copy_init((void*)destination, (void*)source, bytes);
  return CUDA_SUCCESS;
}
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void* source, size_t bytes,
                                  CUstream) {
  return cuMemcpyHtoD_v2(destination, source, bytes);
}
API CUresult cuMemcpyDtoHAsync_v2(void* destination, CUdeviceptr source, size_t bytes, CUstream) {
  return cuMemcpyDtoH_v2(destination, source, bytes);
}
API CUresult cuMemsetD8_v2(CUdeviceptr destination, unsigned char value, size_t bytes) {
  memset((void*)destination, value, bytes);
  memory_mark_init((void*)destination, bytes);
  return CUDA_SUCCESS;
}
API CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, size_t bytes, CUstream) {
  return cuMemsetD8_v2(destination, value, bytes);
}
