// A CUDA runtime in which every call succeeds at once and no kernel runs, for host_time.py: what is
// left of an op is the time that it takes the CPU. It describes some GPUs, counts what it is asked
// for, and stands in for libcudart.so.13 once it is loaded (the loader goes by that name).
#include <stddef.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

// What the calls cost in a real runtime differs widely, so they are counted one by one.
EXPORT long null_launches, null_clears, null_tensor_maps, null_entry_points;
EXPORT long null_devices, null_attributes, null_function_attributes, null_occupancies;
// The last that was asked of a kernel: percent of an SM's memory that it would share.
EXPORT int null_carveout;

static int current;

// 0: an H100, 1: an A100, 2: an L40S.
EXPORT void null_use_device(int device) { current = device; }

static unsigned long long context = 1;
static int context_sms, affinity_sms;  // 0: all

// From now on another context is current: a green one of so many multiprocessors, or one to which
// MPS gives so many.
EXPORT void null_use_context(unsigned long long id, int green, int mps) {
  context = id;
  context_sms = green;
  affinity_sms = mps;
}
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
      *value = device == 0 ? 132 : device == 1 ? 108 : 142;
      break;
    case 75:  // compute capability, major
      *value = device == 0 ? 9 : 8;
      break;
    case 76:  // minor
      *value = device == 2 ? 9 : 0;
      break;
    case 81:  // shared memory of a multiprocessor
      *value = device == 0 ? 233472 : device == 1 ? 167936 : 102400;
      break;
    case 97:  // the most shared memory that one block can be given
      *value = device == 0 ? 232448 : device == 1 ? 166912 : 101376;
      break;
    default:
      *value = 0;
  }
  return 0;
}

EXPORT int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  (void)function;
  ++null_function_attributes;
  if (attribute == 9) null_carveout = value;
  return 0;
}

EXPORT int cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const void* config) {
  (void)function, (void)config;
  ++null_occupancies;
  *clusters = 66;
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

static int context_id(void* of, unsigned long long* id) {
  (void)of;
  *id = context;
  return 0;
}
static int context_current(void** found) {
  *found = &context;
  return 0;
}
// CUexecAffinityParam: a type, then the number.
static int context_affinity(int* affinity, int type) {
  (void)type;
  affinity[1] = affinity_sms;
  return affinity_sms == 0 ? 801 : 0;  // not supported: no MPS
}
// CUdevResource: a type and what is reserved, 96 bytes, then the number.
static int context_resource(void* of, int* resource, int type) {
  (void)type;
  resource[24] = context_sms != 0 ? context_sms : current == 0 ? 132 : current == 1 ? 108 : 142;
  return of != &context;
}

EXPORT int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                            unsigned long long flags, int* found) {
  static const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuTensorMapEncodeTiled", (void*)&encode_tensor_map},
      {"cuCtxGetId", (void*)&context_id},
      {"cuCtxGetCurrent", (void*)&context_current},
      {"cuCtxGetExecAffinity", (void*)&context_affinity},
      {"cuCtxGetDevResource", (void*)&context_resource},
  };
  (void)version, (void)flags;
  ++null_entry_points;
  *function = NULL;
  for (size_t i = 0; i < sizeof known / sizeof known[0]; ++i) {
    if (strcmp(name, known[i].name) == 0) *function = known[i].function;
  }
  if (found != NULL) *found = *function == NULL;  // 1: no such symbol
  return 0;
}
EXPORT int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                   int* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, found);
}

// --- streams, and the graphs that they are captured into ---

static unsigned long long capture;  // 0: none
static int symbol_refused;
// From now on every stream is captured under this number, until it is 0.
EXPORT void null_capture(unsigned long long id) { capture = id; }
// From now on there are no variables of the library.
EXPORT void null_refuse_symbols(int refuse) { symbol_refused = refuse; }

EXPORT int cudaStreamGetId(void* stream, unsigned long long* id) {
  *id = (unsigned long long)(size_t)stream + 1;
  return 0;
}
EXPORT int cudaStreamGetCaptureInfo(void* stream, int* status, unsigned long long* id, void** graph,
                                    void* dependencies, void* edges, size_t* count) {
  (void)stream, (void)dependencies, (void)edges, (void)count;
  *status = capture != 0;
  if (id != NULL) *id = capture;
  if (graph != NULL) *graph = &capture;
  return 0;
}
EXPORT int cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = (void*)symbol;
  return symbol_refused ? 13 : 0;
}

// What graphs hold: destructors, all called by null_destroy_graphs.
static struct {
  void (*destroy)(void*);
  void* argument;
} held[1024];
static int held_count;
EXPORT int cudaUserObjectCreate(void** object, void* argument, void (*destroy)(void*),
                                unsigned count, unsigned flags) {
  (void)count, (void)flags;
  if (held_count == 1024) return 2;
  held[held_count].destroy = destroy;
  held[held_count].argument = argument;
  *object = &held[held_count++];
  return 0;
}
EXPORT int cudaGraphRetainUserObject(void* graph, void* object, unsigned count, unsigned flags) {
  (void)graph, (void)object, (void)count, (void)flags;
  return 0;
}
EXPORT int cudaUserObjectRelease(void* object, unsigned count) {
  (void)object, (void)count;
  return 0;
}
EXPORT void null_destroy_graphs(void) {
  while (held_count > 0) {
    --held_count;
    held[held_count].destroy(held[held_count].argument);
  }
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
