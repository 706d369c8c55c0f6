// The part of torch's stable ABI that the binding uses. Binding ring: the only folder that includes
// torch.
//
// TORCH_TARGET_VERSION comes from the build (tools/build/plan.py), so that every file agrees on
// it.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error \
    "TORCH_TARGET_VERSION is not set: the library would need the newest torch; build with setup.py"
#endif

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sqk/status.h"

// In a build for the simulator (tests/simulator.py) the kernels take host memory, so they are bound
// to the CPU key; everything else in the binding stays as it is.
#ifdef SQK_SIMULATOR
#define SQK_DISPATCH_KEY CPU
#else
#define SQK_DISPATCH_KEY CUDA
#endif

// Calls a function of libtorch that returns an error code; throws what libtorch says of an error.
// torch's own macro for that came with the headers of torch 2.13, too late for TORCH_TARGET.
#define SQK_TORCH_CALL(function, ...)                                              \
  do {                                                                             \
    if (function(__VA_ARGS__) != TORCH_SUCCESS) sqk::throw_torch_error(#function); \
  } while (0)

namespace sqk {

[[noreturn]] inline void throw_torch_error(const char* function) {
  // Exported by libtorch 2.13 and newer; asked for by name, so that the library needs no symbol
  // that the oldest torch lacks. Older ones only log their reason.
  using What = const char* (*)();
  void* what = dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace");
  const char* reason = what != nullptr ? reinterpret_cast<What>(what)() : nullptr;
  throw std::runtime_error(std::string(function) + " failed: " +
                           (reason ? reason : "libtorch wrote the reason to standard error."));
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's GPU the current one for a scope, and names the stream that torch uses on it.
class Launch {
 public:
#ifdef SQK_SIMULATOR
  explicit Launch(const Tensor&) {}
#else
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    SQK_TORCH_CALL(aoti_torch_get_current_cuda_stream, tensor.get_device_index(), &stream);
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  cudaStream_t stream() const { return stream_; }

 private:
#ifndef SQK_SIMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// A tensor's device by libtorch's own numbers, which are enough to compare and to allocate.
// Tensor::device() asks libtorch for every device type by name until one is it.
struct Place {
  int32_t type, index;

  explicit Place(const Tensor& tensor) {
    SQK_TORCH_CALL(aoti_torch_get_device_type, tensor.get(), &type);
    SQK_TORCH_CALL(aoti_torch_get_device_index, tensor.get(), &index);
  }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// Memory from torch's allocator, contiguous, on the device of `like`: safe to capture in a CUDA
// graph. Not torch::stable::empty, which calls an op by its name: that costs a microsecond.
inline Tensor empty_on(const Tensor& like, const int64_t* sizes, size_t dims, ScalarType dtype) {
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const Place place(like);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  SQK_TORCH_CALL(aoti_torch_empty_strided, static_cast<int64_t>(dims), sizes, strides.data(), type,
                 place.type, place.index, &made);
  return Tensor(made);
}

}  // namespace sqk
