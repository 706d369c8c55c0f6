// Copies and fills.
#include "checks/overlap.h"
#include "runtime/runtime.h"

using namespace ptxsim;

// A copy must stay inside the allocation its device end lies in.
static bool stays_inside(const void* address, size_t bytes, const char* what) {
  Allocation allocation;
  if (!memory_find(address, allocation)) return true;  // plain host memory
  u64 end = (u64)address + bytes, allocation_end = allocation.base + allocation.size;
  if (end <= allocation_end) return true;
  fprintf(stderr,
          "ptxsim: %s of %zu bytes at %p runs %llu bytes past the end of a %s allocation of %llu "
          "bytes\n",
          what, bytes, address, (unsigned long long)(end - allocation_end), allocation.kind,
          (unsigned long long)allocation.size);
  return false;
}

// Warns when bytes that no kernel has written are copied to where they are no longer followed.
static void warn_of_uninitialized(const void* destination, const void* source, size_t bytes) {
  Allocation from, to;
  if (!memory_find(source, from) || !from.init) return;
  if (memory_find(destination, to) && to.init) return;
  const u8* state = from.init + ((u64)source - from.base);
  for (size_t i = 0; i < bytes; i++) {
    if (state[i] == 1) continue;
    fprintf(stderr,
            "ptxsim: warning: cudaMemcpy to host of %zu bytes copies bytes %s, the first at "
            "offset %zu\n",
            bytes, state[i] ? "that depend on uninitialized memory" : "that were never written", i);
    return;
  }
}

API cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t error = sticky_runtime_error()) return runtime_error(error);
  if (!bytes) return cudaSuccess;
  if (!destination || !source || !stays_inside(destination, bytes, "cudaMemcpy (destination)") ||
      !stays_inside(source, bytes, "cudaMemcpy (source)"))
    return runtime_error(cudaErrorInvalidValue);
  forget_kernels();
  memmove(destination, source, bytes);
  if (options().check_init) warn_of_uninitialized(destination, source, bytes);
  memory_copy_init(destination, source, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes,
                                cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(destination, source, bytes, kind);
}
API cudaError_t cudaMemcpyPeer(void* destination, int, const void* source, int, size_t bytes) {
  return cudaMemcpy(destination, source, bytes, cudaMemcpyDefault);
}
API cudaError_t cudaMemcpyPeerAsync(void* destination, int, const void* source, int, size_t bytes,
                                    cudaStream_t) {
  return cudaMemcpy(destination, source, bytes, cudaMemcpyDefault);
}
API cudaError_t cudaMemcpy2D(void* destination, size_t destination_pitch, const void* source,
                             size_t source_pitch, size_t width, size_t height,
                             cudaMemcpyKind kind) {
  if (width > destination_pitch || width > source_pitch)
    return runtime_error(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; row++) {
    char* to = (char*)destination + row * destination_pitch;
    const char* from = (const char*)source + row * source_pitch;
    if (cudaError_t error = cudaMemcpy(to, from, width, kind)) return error;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void* destination, size_t destination_pitch, const void* source,
                                  size_t source_pitch, size_t width, size_t height,
                                  cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(destination, destination_pitch, source, source_pitch, width, height, kind);
}
API cudaError_t cudaMemset(void* destination, int value, size_t bytes) {
  if (cudaError_t error = sticky_runtime_error()) return runtime_error(error);
  if (!bytes) return cudaSuccess;
  if (!destination || !stays_inside(destination, bytes, "cudaMemset"))
    return runtime_error(cudaErrorInvalidValue);
  forget_kernels();
  memset(destination, value, bytes);
  memory_mark_init(destination, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(destination, value, bytes);
}
API cudaError_t cudaMemset2D(void* destination, size_t pitch, int value, size_t width,
                             size_t height) {
  for (size_t row = 0; row < height; row++)
    if (cudaError_t error = cudaMemset((char*)destination + row * pitch, value, width))
      return error;
  return cudaSuccess;
}
API cudaError_t cudaMemset2DAsync(void* destination, size_t pitch, int value, size_t width,
                                  size_t height, cudaStream_t) {
  return cudaMemset2D(destination, pitch, value, width, height);
}

API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return find_symbol(symbol, address, nullptr);
}
API cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  return find_symbol(symbol, nullptr, bytes);
}
// The address of a part of a registered variable.
static cudaError_t find_part(const void* symbol, size_t offset, size_t bytes, void** part) {
  void* address;
  size_t size;
  if (cudaError_t error = find_symbol(symbol, &address, &size)) return error;
  if (offset + bytes > size) return runtime_error(cudaErrorInvalidValue);
  *part = (char*)address + offset;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t bytes,
                                   size_t offset, cudaMemcpyKind kind) {
  void* part = nullptr;
  if (cudaError_t error = find_part(symbol, offset, bytes, &part)) return error;
  return cudaMemcpy(part, source, bytes, kind);
}
API cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t bytes,
                                        size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, source, bytes, offset, kind);
}
API cudaError_t cudaMemcpyFromSymbol(void* destination, const void* symbol, size_t bytes,
                                     size_t offset, cudaMemcpyKind kind) {
  void* part = nullptr;
  if (cudaError_t error = find_part(symbol, offset, bytes, &part)) return error;
  return cudaMemcpy(destination, part, bytes, kind);
}
API cudaError_t cudaMemcpyFromSymbolAsync(void* destination, const void* symbol, size_t bytes,
                                          size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyFromSymbol(destination, symbol, bytes, offset, kind);
}

PER_THREAD_STREAM(cudaMemcpyAsync);
PER_THREAD_STREAM(cudaMemcpyToSymbolAsync);
PER_THREAD_STREAM(cudaMemcpyFromSymbolAsync);
PER_THREAD_STREAM(cudaMemcpy2DAsync);
PER_THREAD_STREAM(cudaMemsetAsync);
PER_THREAD_STREAM(cudaMemset2DAsync);
PER_THREAD_DEFAULT_STREAM(cudaMemcpy);
PER_THREAD_DEFAULT_STREAM(cudaMemcpyToSymbol);
PER_THREAD_DEFAULT_STREAM(cudaMemcpyFromSymbol);
PER_THREAD_DEFAULT_STREAM(cudaMemcpy2D);
PER_THREAD_DEFAULT_STREAM(cudaMemset);
PER_THREAD_DEFAULT_STREAM(cudaMemset2D);
