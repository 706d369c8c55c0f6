// Dependent launches: right ones, and ones with a defect each.
#include <cuda_runtime.h>

#define WAIT asm volatile("griddepcontrol.wait;" ::: "memory")
#define TRIGGER asm volatile("griddepcontrol.launch_dependents;" ::: "memory")

enum Defect {
  kNone,
  kReadsEarly,
  kCopiesEarly,
  kWritesEarly,
  kNeverWaits,
  kOthersRead,
  kTriggersEarly
};

// b = a + 1. Reads `constant`, which no kernel writes, before the wait.
__global__ void add_one(const int* a, int* b, const int* constant, int n, int defect) {
  __shared__ int copy[256];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) {
    WAIT;
    return;
  }
  int one = constant[i], early = 0;
  if (defect == kTriggersEarly) TRIGGER;
  if (defect == kReadsEarly) early = *(volatile const int*)(a + i);
  if (defect == kCopiesEarly) {
    unsigned to = (unsigned)__cvta_generic_to_shared(copy + threadIdx.x);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(a + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  if (defect == kWritesEarly) b[i] = 0;
  // Every fourth warp relies on the others, without a barrier.
  bool waits = defect != kNeverWaits && (defect != kOthersRead || threadIdx.x / 32 % 4 != 3);
  if (waits) WAIT;
  if (defect != kTriggersEarly) TRIGGER;
  if (defect == kCopiesEarly) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    early = copy[threadIdx.x];
  }
  b[i] = (defect == kReadsEarly || defect == kCopiesEarly ? early : a[i]) + one;
}

// One warp waits, and passes it on by a barrier.
__global__ void add_one_by_barrier(const int* a, int* b, const int* constant, int n, int) {
  if (threadIdx.x < 32) WAIT;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) b[i] = a[i] + constant[i];
}

static int launch(decltype(&add_one) kernel, const int* a, int* b, const int* one, int n,
                  int defect) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n + 255) / 256);
  config.blockDim = dim3(256);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a, b, one, n, defect);
}

// c = a + 3 in three launches; a -> b -> a -> c: the second writes what the first one reads.
// `memset`: clears c before the last launch, so that no kernel comes right before it. first, last:
// their defects.
extern "C" int run_chain(int* a, int* b, int* c, const int* one, int n, int first, int last,
                         int barrier, int memset) {
  auto kernel = barrier ? &add_one_by_barrier : &add_one;
  if (int error = launch(kernel, a, b, one, n, kNone)) return error;
  if (int error = launch(kernel, b, a, one, n, first)) return error;
  if (memset) cudaMemsetAsync(c, 0, n * sizeof(int), 0);
  return launch(kernel, a, c, one, n, last);
}
