// What the files of the runtime share: its entry points stand in libcudart.so.13.
#pragma once
#include <cuda_runtime_api.h>

#include "device/device.h"

#define API extern "C" __attribute__((visibility("default")))
// The name of an entry point under which code compiled with per-thread default streams calls it.
// Everything is synchronous, so that it is the same function. It stands in the file of the
// function.
#define PER_THREAD_STREAM(function) \
  API __attribute__((alias(#function))) decltype(function) function##_ptsz
#define PER_THREAD_DEFAULT_STREAM(function) \
  API __attribute__((alias(#function))) decltype(function) function##_ptds

namespace ptxsim {
// The kernel of a host stub or of a cudaKernel_t; null when it is not registered.
KernelHandle* find_kernel(const void* function);
// Address and size of a registered __device__ variable.
cudaError_t find_symbol(const void* symbol, void** address, size_t* bytes);
// The address of a symbol of a library, under its name or the name of a version of it.
void* find_versioned_symbol(void* library, const std::string& name);
void* own_library();  // a dlopen handle of this library
int device_attribute(int attribute);
const char* error_name(int code);
const char* error_text(int code);

inline cudaError_t runtime_error(int code) { return (cudaError_t)note_error(code); }
inline cudaError_t sticky_runtime_error() { return (cudaError_t)sticky_error(); }
}  // namespace ptxsim
