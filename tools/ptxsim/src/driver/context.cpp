// The device, its context and error texts.
#include "driver/driver.h"

using namespace ptxsim;

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
  *device = 0;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, (size_t)size, "ptxsim %s", architecture().name.c_str());
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetUuid_v2(CUuuid* id, CUdevice) {
  memset(id, 0, sizeof *id);
  return CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  *bytes = 64ull << 30;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = device_attribute(attribute);
  return CUDA_SUCCESS;
}
API CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
  *major = architecture().compute_capability / 10;
  *minor = architecture().compute_capability % 10;
  return CUDA_SUCCESS;
}
static int g_context;  // the handle of the only context
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = (CUcontext)&g_context;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)&g_context;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
  *id = 1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (context) *context = (CUcontext)&g_context;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSynchronize() { return driver_error(sticky_error()); }
API CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = error_text(code);
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult code, const char** name) {
  *name = error_name(code);
  return CUDA_SUCCESS;
}
API CUresult cuStreamSynchronize(CUstream) { return driver_error(sticky_error()); }
