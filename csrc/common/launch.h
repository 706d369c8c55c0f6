// One way to launch a kernel. Kernel ring: no torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/status.h"

namespace sqk {

constexpr int kMaxDevices = 64;  // of which anything is remembered

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

// What the driver keeps of every block's shared memory.
constexpr int64_t kDriverShared = 1024;

// How a multiprocessor divides its memory between L1 and shared memory is the driver's choice, by a
// heuristic that may leave room for one block only: this asks for that of `blocks`. A wish: whether
// it is granted changes no result, so a refusal is no error.
inline void ask_for_carveout(const void* function, int64_t bytes, int blocks, int device) {
  int shared = 0;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) !=
          cudaSuccess ||
      shared <= 0) {
    (void)cudaGetLastError();
    return;
  }
  const int64_t percent = divide_up(100 * blocks * (bytes + kDriverShared), shared);
  if (cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                           static_cast<int>(percent < 100 ? percent : 100)) != cudaSuccess) {
    (void)cudaGetLastError();
  }
}

// What must be asked for once per kernel and device, because the answer stays: more than 48 KiB of
// shared memory, and room for several blocks. Two threads may both ask, for the same.
//
//   bytes   dynamic shared memory, the most of all launches of this kernel
//   blocks  that are to share a multiprocessor
inline Status allow_shared_memory(const void* function, int64_t bytes, int blocks,
                                  DevicesSeen& seen) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return status_from_call(error);
  const uint64_t bit = device < kMaxDevices ? uint64_t{1} << device : 0;
  if (seen.load(std::memory_order_acquire) & bit) return Status::kSuccess;
  Status status = Status::kSuccess;
  if (bytes > 48 * 1024) {
    status = status_from_call(cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  if (status != Status::kSuccess) return status;
  ask_for_carveout(function, bytes, blocks, device);
  seen.fetch_or(bit, std::memory_order_release);
  return status;
}

// A launch's configuration as the runtime takes it.
struct LaunchConfig {
  explicit LaunchConfig(const KernelLaunch& launch) {
    if (launch.cluster.x * launch.cluster.y > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim = {launch.cluster.x, launch.cluster.y, 1};
      ++config.numAttrs;
    }
    if (launch.overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
      ++config.numAttrs;
    }
    config.gridDim = launch.grid;
    config.blockDim = launch.block;
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = launch.stream;
    config.attrs = attributes;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // `config` points into it

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
};

// `params` is the kernel's only argument.
inline Status launch_kernel(const KernelLaunch& launch, void* params) {
  const LaunchConfig with(launch);
  void* arguments[] = {params};
  return status_from_call(cudaLaunchKernelExC(&with.config, launch.function, arguments));
}

// Clusters of this launch that the GPU can run at a time; 0 where the runtime does not say. The
// kernel has been allowed its shared memory.
inline int max_active_clusters(const KernelLaunch& launch) {
  const LaunchConfig with(launch);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, launch.function, &with.config) == cudaSuccess) {
    return clusters;
  }
  (void)cudaGetLastError();
  return 0;
}

}  // namespace sqk
