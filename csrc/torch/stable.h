// The part of torch's stable ABI that the binding uses. Binding ring: the only folder that includes
// torch.
//
// TORCH_TARGET_VERSION comes from the build (tools/build_support.py), so that every file agrees on
// it.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error \
    "TORCH_TARGET_VERSION is not set: the library would need the newest torch; build with setup.py"
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sqk/status.h"

// In a build for the simulator (tests/simulator.py) the kernels take host memory, so they are bound
// to the CPU key; everything else in the binding stays as it is.
#ifdef SQK_SIMULATOR
#define SQK_DISPATCH_KEY CPU
#else
#define SQK_DISPATCH_KEY CUDA
#endif

namespace sqk {

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
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
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

// Memory from torch's allocator, on the device of `like`: safe to capture in a CUDA graph.
inline Tensor empty_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

}  // namespace sqk
