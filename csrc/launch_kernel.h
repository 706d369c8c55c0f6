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

// Devices on which a kernel has been allowed its shared memory, a bit each; static, one per kernel.
using DevicesSeen = std::atomic<uint64_t>;

// More than 48 KiB of shared memory must be asked for, once per device: the answer stays.
inline cudaError_t allow_shared_memory(const void* function, int64_t bytes, DevicesSeen& seen) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (seen.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error == cudaSuccess) seen.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// `params` is the kernel's only argument. `most_shared_bytes`: of all launches of this kernel.
inline Status launch_kernel(const KernelLaunch& launch, void* params, int64_t most_shared_bytes,
                            DevicesSeen& seen) {
  cudaError_t error = allow_shared_memory(launch.function, most_shared_bytes, seen);
  if (error == cudaSuccess) {
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
    error = cudaLaunchKernelExC(&config, launch.function, arguments);
  }
  // No code for this GPU, as the runtime says it at one place or the other.
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    return Status::kUnsupportedArch;
  }
  return status_from_cuda(error);
}

}  // namespace sqk
