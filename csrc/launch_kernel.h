// One way to launch a kernel. Kernel ring: no torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "sqk/status.h"

namespace sqk {

struct KernelLaunch {
  const void* function;
  dim3 grid, block;
  int64_t shared_bytes;  // dynamic
  cudaStream_t stream;
  dim3 cluster = {1, 1, 1};
  bool overlap = false;  // may start while the kernel before it in the stream ends (Hopper)
};

// What a call returned, and nothing left behind: the runtime would name the error again when
// somebody else asks how their own call went.
inline Status status_from_call(cudaError_t error) {
  if (error == cudaSuccess) return Status::kSuccess;
  (void)cudaGetLastError();
  // No code for this GPU, as the runtime says it at one place or the other.
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    return Status::kUnsupportedArch;
  }
  return status_from_cuda(error);
}

// Devices on which a kernel has been allowed its shared memory, a bit each; static, one per kernel.
using DevicesSeen = std::atomic<uint64_t>;

// More than 48 KiB of shared memory must be asked for, once per device: the answer stays. `bytes`:
// the most of all launches of this kernel.
inline Status allow_shared_memory(const void* function, int64_t bytes, DevicesSeen& seen) {
  if (bytes <= 48 * 1024) return Status::kSuccess;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return status_from_call(error);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (seen.load(std::memory_order_relaxed) & bit) return Status::kSuccess;
  const Status status = status_from_call(cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (status == Status::kSuccess) seen.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

// `params` is the kernel's only argument.
inline Status launch_kernel(const KernelLaunch& launch, void* params) {
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (launch.cluster.x * launch.cluster.y > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {launch.cluster.x, launch.cluster.y, 1};
    ++count;
  }
  if (launch.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  void* arguments[] = {params};
  return status_from_call(cudaLaunchKernelExC(&config, launch.function, arguments));
}

}  // namespace sqk
