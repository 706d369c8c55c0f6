// Functions of the driver, looked up at run time: the library does not link libcuda, and older
// drivers lack some of them. Kernel ring: no torch.
#pragma once

#include <cuda_runtime_api.h>

namespace sqk {

// nullptr if the driver has no such function. `version`: the CUDA release that has this signature.
template <typename Function>
Function driver_function(const char* name, [[maybe_unused]] unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace sqk
