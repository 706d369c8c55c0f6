// Launches: what <<<>>> compiles to, and cudaLaunchKernel and its variants.
#include "runtime/runtime.h"

using namespace ptxsim;

namespace {
struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<CallConfiguration> g_call_configurations;

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                   size_t shared_bytes, const cudaLaunchAttribute* attributes,
                   unsigned attribute_count) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) {
    fprintf(stderr, "ptxsim: launch of an unregistered function %p\n", function);
    return runtime_error(cudaErrorInvalidDeviceFunction);
  }
  LaunchRequest request{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
  request.dynamic_shared = shared_bytes;
  request.arguments = arguments;
  for (unsigned i = 0; i < attribute_count; i++) {
    const cudaLaunchAttributeValue& value = attributes[i].val;
    if (attributes[i].id == cudaLaunchAttributeClusterDimension) {
      request.cluster[0] = value.clusterDim.x;
      request.cluster[1] = value.clusterDim.y;
      request.cluster[2] = value.clusterDim.z;
    } else if (attributes[i].id == cudaLaunchAttributeCooperative)
      request.cooperative = value.cooperative;
    else if (attributes[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      request.overlap = value.programmaticStreamSerializationAllowed;
  }
  return (cudaError_t)launch_kernel(handle, request);
}
}  // namespace

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                         cudaStream_t stream) {
  g_call_configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                           void* stream) {
  if (g_call_configurations.empty()) return cudaErrorMissingConfiguration;
  CallConfiguration configuration = g_call_configurations.back();
  g_call_configurations.pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *(cudaStream_t*)stream = configuration.stream;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                   size_t shared_bytes, cudaStream_t) {
  return launch((const void*)kernel, grid, block, arguments, shared_bytes, nullptr, 0);
}
API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block,
                                        void** arguments, size_t shared_bytes, cudaStream_t) {
  return launch((const void*)kernel, grid, block, arguments, shared_bytes, nullptr, 0);
}

API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                 size_t shared_bytes, cudaStream_t) {
  return launch(function, grid, block, arguments, shared_bytes, nullptr, 0);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                    void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                config->attrs, config->numAttrs);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                            void** arguments, size_t shared_bytes, cudaStream_t) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch(function, grid, block, arguments, shared_bytes, &attribute, 1);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}

PER_THREAD_STREAM(cudaLaunchKernel);
PER_THREAD_STREAM(cudaLaunchKernelExC);
PER_THREAD_STREAM(cudaLaunchCooperativeKernel);
PER_THREAD_STREAM(cudaLaunchHostFunc);
