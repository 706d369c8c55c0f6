// A CUDA runtime in which every call succeeds at once and no kernel runs, for host_time.py: what is
// left of an op is the time that it takes the CPU. It describes two GPUs, counts what it is asked
// for, and stands in for libcudart.so.13 once it is loaded (the loader goes by that name).
#include <stddef.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

// What the calls cost in a real runtime differs widely, so they are counted one by one.
EXPORT long null_launches, null_clears, null_tensor_maps, null_entry_points;
EXPORT long null_devices, null_attributes, null_function_attributes;

static int current;

// 0: an H100, 1: an A100.
EXPORT void null_use_device(int device) { current = device; }
// What a call through ctypes costs by itself.
EXPORT int null_call(void* a, void* b, void* c) { return a == NULL && b == NULL && c == NULL; }

EXPORT int cudaGetDevice(int* device) {
  ++null_devices;
  *device = current;
  return 0;
}

EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  ++null_attributes;
  switch (attribute) {
    case 16:  // multiprocessors
      *value = device == 0 ? 132 : 108;
      break;
    case 75:  // compute capability, major
      *value = device == 0 ? 9 : 8;
      break;
    case 97:  // the most shared memory that one block can be given
      *value = device == 0 ? 232448 : 166912;
      break;
    default:  // among them the minor capability
      *value = 0;
  }
  return 0;
}

EXPORT int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  (void)function, (void)attribute, (void)value;
  ++null_function_attributes;
  return 0;
}

EXPORT int cudaLaunchKernelExC(const void* config, const void* function, void** arguments) {
  (void)config, (void)function, (void)arguments;
  ++null_launches;
  return 0;
}

EXPORT int cudaMemsetAsync(void* pointer, int value, size_t bytes, void* stream) {
  (void)pointer, (void)value, (void)bytes, (void)stream;
  ++null_clears;
  return 0;
}

// cuTensorMapEncodeTiled: an empty map would mean that the driver has refused.
static int encode_tensor_map(void* map) {
  ++null_tensor_maps;
  memset(map, 1, 128);
  return 0;
}

// The library asks for cuTensorMapEncodeTiled only.
EXPORT int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                            unsigned long long flags, int* found) {
  (void)name, (void)version, (void)flags;
  ++null_entry_points;
  *function = (void*)&encode_tensor_map;
  if (found != NULL) *found = 0;
  return 0;
}
EXPORT int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                   int* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, found);
}

EXPORT int cudaGetLastError(void) { return 0; }
EXPORT int cudaPeekAtLastError(void) { return 0; }
EXPORT const char* cudaGetErrorName(int error) { return error == 0 ? "cudaSuccess" : "cudaError"; }
EXPORT const char* cudaGetErrorString(int error) { return cudaGetErrorName(error); }

// What nvcc writes for kernel<<<...>>>(...), and in front of main().
typedef struct {
  unsigned x, y, z;
} Dim3;

EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  (void)grid, (void)block, (void)shared, (void)stream;
  return 0;
}
EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = *block = (Dim3){1, 1, 1};
  *shared = 0;
  *(void**)stream = NULL;
  return 0;
}
EXPORT int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
EXPORT int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments,
                              size_t shared, void* stream) {
  (void)kernel, (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
  ++null_launches;
  return 0;
}
EXPORT int cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments,
                            size_t shared, void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

EXPORT void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  (void)binary;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
EXPORT void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
EXPORT void __cudaRegisterFunction(void) {}
EXPORT void __cudaRegisterVar(void) {}
EXPORT char __cudaInitModule(void** handle) {
  (void)handle;
  return 0;
}
