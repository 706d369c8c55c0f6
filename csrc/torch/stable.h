// The part of torch's stable ABI that the binding uses. Binding ring: the only folder that includes
// torch.
//
// The build sets TORCH_TARGET_VERSION, so that all files agree on it.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error \
    "TORCH_TARGET_VERSION is not set: the library would need the newest torch; build with setup.py"
#endif

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>
#ifdef SQK_CPU
#include "cpu/threads.h"
#else
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sqk/status.h"

// The binding is compiled twice: with SQK_CPU for the kernels of csrc/cpu, without it for CUDA. In
// a build for the simulator (tests/support/simulator.py) the CUDA kernels take host memory, so they
// are bound to the CPU key. Nothing else in that build differs.
#if defined(SQK_CPU) || defined(SQK_SIMULATOR)
#define SQK_DISPATCH_KEY CPU
#else
#define SQK_DISPATCH_KEY CUDA
#endif

// Calls a function of libtorch that returns an error code, and throws libtorch's message if it
// fails. torch's own macro for this came with torch 2.13, too late for TORCH_TARGET.
#define SQK_TORCH_CALL(function, ...)                                              \
  do {                                                                             \
    if (function(__VA_ARGS__) != TORCH_SUCCESS) sqk::throw_torch_error(#function); \
  } while (0)

namespace sqk {

[[noreturn]] inline void throw_torch_error(const char* function) {
  // libtorch 2.13 and newer export this. It is looked up by name, so that the library also loads
  // with an older torch, which only logs the reason.
  using What = const char* (*)();
  void* what = dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace");
  const char* reason = what != nullptr ? reinterpret_cast<What>(what)() : nullptr;
  throw std::runtime_error(std::string(function) + " failed: " +
                           (reason ? reason : "libtorch wrote the reason to standard error."));
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef SQK_CPU

// torch's own threads, as the kernels of csrc/cpu take them in the place of a stream.
class Launch {
 public:
  explicit Launch(const Tensor&) {
    uint32_t count = 1;
    SQK_TORCH_CALL(torch_get_num_threads, &count);
    threads_ = {std::max<int64_t>(count, 1), run};
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaStream_t stream() const { return as_stream(&threads_); }

 private:
  struct Work {
    Task task;
    void* context;
  };

  // torch gives each of its threads one range of adjacent tasks. No exception may pass through its
  // loop, and no task throws one.
  static void run(int64_t tasks, Task task, void* context) {
    Work work{task, context};
    SQK_TORCH_CALL(torch_parallel_for, 0, tasks, 1, run_range, &work);
  }
  static void run_range(int64_t begin, int64_t end, void* given) {
    const Work& work = *static_cast<const Work*>(given);
    for (int64_t i = begin; i < end; ++i) work.task(work.context, i);
  }

  Threads threads_;
};

#else

// Makes the tensor's GPU current for a scope, and gives the stream that torch uses on it.
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

#endif  // SQK_CPU

// A tensor's device as libtorch's numbers, which are enough to compare and to allocate.
// Tensor::device() would ask libtorch for one device type after another until one matches.
struct Place {
  int32_t type, index;

  explicit Place(const Tensor& tensor) {
    SQK_TORCH_CALL(aoti_torch_get_device_type, tensor.get(), &type);
#ifdef SQK_CPU  // there is only one
    index = 0;
#else
    SQK_TORCH_CALL(aoti_torch_get_device_index, tensor.get(), &index);
#endif
  }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// A tensor's sizes or strides, in an array that a call does not have to allocate.
class Sizes {
 public:
  explicit Sizes(size_t dims) {
    if (dims > std::size(few_)) many_.resize(dims);
  }
  int64_t* data() { return many_.empty() ? few_ : many_.data(); }

 private:
  int64_t few_[8];
  std::vector<int64_t> many_;
};

// Memory from torch's allocator, contiguous, on the device of `like`: safe to capture in a CUDA
// graph. torch::stable::empty calls an op by its name, which costs a microsecond more.
inline Tensor empty_on(const Tensor& like, const int64_t* sizes, size_t dims, ScalarType dtype) {
  Sizes strides(dims);
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides.data()[i] = stride;
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
