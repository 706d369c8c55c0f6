// How every kernel is launched. Kernel ring: no torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/device.h"
#include "sqk/status.h"

namespace sqk {

constexpr int kMaxDevices = 64;  // facts about devices with a higher number are not remembered

struct KernelLaunch {
  const void* function;
  dim3 grid, block;
  int64_t shared_bytes;  // dynamic
  cudaStream_t stream;
  dim3 cluster = {1, 1, 1};
  bool overlap = false;  // may start before the previous kernel in the stream has ended; it waits
};

// Whether kernels may be launched to overlap on this GPU: their code is that for 9.0a, which waits
// (memory_order.cuh); the code for older GPUs, which newer ones run too, does not. The environment
// variable SQK_OVERLAP=0 turns it off; it is read once.
bool may_overlap(const Device& device);

// The current context's number, which is never used again. False if the driver does not say.
bool context_id(unsigned long long* id);

// Also clears the runtime's last error: it would otherwise be reported to whoever asks next, about
// another call.
inline Status status_from_call(cudaError_t error) {
  if (error == cudaSuccess) return Status::kSuccess;
  (void)cudaGetLastError();
  // Both mean that the library has no code for this GPU.
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice) {
    return Status::kUnsupportedArch;
  }
  return status_from_cuda(error);
}

// The devices on which a kernel has been granted its shared memory, one bit each. Static, one per
// kernel.
using DevicesSeen = std::atomic<uint64_t>;

// The driver reserves this much of every block's shared memory.
constexpr int64_t kDriverShared = 1024;

// The driver divides a multiprocessor's memory between L1 and shared memory, by a heuristic that
// may leave room for only one block. This asks for room for `blocks`. It is a hint that changes no
// result, so a refusal is not an error.
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

// Asks for more than 48 KiB of shared memory and for room for several blocks. Once per kernel and
// device is enough, because the settings persist. Two threads may both ask: they ask for the same.
//
//   bytes   dynamic shared memory: the maximum over all launches of this kernel
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

// A launch's configuration in the runtime's form.
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

// How many clusters of this launch the GPU can run at a time; 0 if the runtime does not say. Call
// allow_shared_memory for the kernel first.
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
