// Asks the runtime about the GPU and the driver about the context. Kernel ring: no torch.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/driver.h"
#include "common/launch.h"
#include "sqk/device.h"

namespace sqk {
namespace {

// MPS: what CUDA_MPS_ACTIVE_THREAD_PERCENTAGE or an execution affinity leaves.
int32_t sms_by_affinity(int32_t all) {
  using Ask = CUresult (*)(CUexecAffinityParam*, CUexecAffinityType);
  static const auto ask = driver_function<Ask>("cuCtxGetExecAffinity", 11040);
  CUexecAffinityParam affinity = {};
  if (ask == nullptr || ask(&affinity, CU_EXEC_AFFINITY_TYPE_SM_COUNT) != CUDA_SUCCESS) return all;
  return static_cast<int32_t>(affinity.param.smCount.val);
}

// Green contexts: the group of multiprocessors that the context was made with.
int32_t sms_by_resource(int32_t all) {
#if CUDA_VERSION >= 12040
  using Ask = CUresult (*)(CUcontext, CUdevResource*, CUdevResourceType);
  static const auto ask = driver_function<Ask>("cuCtxGetDevResource", 12040);
  CUcontext context = nullptr;
  using Current = CUresult (*)(CUcontext*);
  static const auto current = driver_function<Current>("cuCtxGetCurrent", 4000);
  CUdevResource resource = {};
  if (ask == nullptr || current == nullptr || current(&context) != CUDA_SUCCESS ||
      ask(context, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) {
    return all;
  }
  return static_cast<int32_t>(resource.sm.smCount);
#else
  return all;
#endif
}

// The multiprocessors of the current context; `all` (the GPU's) if the driver does not say or no
// context exists yet.
int32_t context_sms(int32_t all) {
  struct Known {
    unsigned long long id;
    int32_t sms;  // 0: nothing is known yet
  };
  thread_local Known known = {};
  unsigned long long id = 0;
  if (!context_id(&id)) return all;
  if (known.sms == 0 || known.id != id) {
    const int32_t least = std::min(sms_by_affinity(all), sms_by_resource(all));
    known = {id, least >= 1 && least <= all ? least : all};
  }
  return std::min(known.sms, all);
}

}  // namespace

bool context_id(unsigned long long* id) {
  using Ask = CUresult (*)(CUcontext, unsigned long long*);
  // An id is never reused in a process, unlike a context's address.
  static const auto ask = driver_function<Ask>("cuCtxGetId", 12000);
  return ask != nullptr && ask(nullptr, id) == CUDA_SUCCESS;
}

bool may_overlap(const Device& device) {
  static const bool wanted = [] {
    const char* const given = std::getenv("SQK_OVERLAP");
    return given == nullptr || std::strcmp(given, "0") != 0;
  }();
  return wanted && device.wgmma != 0;
}

Status current_device(Device* device) {
  // One atomic word per device, so threads need no lock: sms (16 bits), capability (16), bytes
  // (32).
  static std::atomic<uint64_t> known[kMaxDevices];
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return status_from_call(error);
  const bool remember = current < kMaxDevices;
  uint64_t word = remember ? known[current].load(std::memory_order_relaxed) : 0;
  if (word == 0) {
    int sms = 0, major = 0, minor = 0, shared = 0;
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, current);
    };
    ask(&sms, cudaDevAttrMultiProcessorCount);
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&minor, cudaDevAttrComputeCapabilityMinor);
    ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (error != cudaSuccess) return status_from_call(error);
    word = static_cast<uint64_t>(sms) | static_cast<uint64_t>(10 * major + minor) << 16 |
           static_cast<uint64_t>(shared) << 32;
    if (remember) known[current].store(word, std::memory_order_relaxed);
  }
  const auto all_sms = static_cast<int32_t>(word & 0xffff);
  device->sms = context_sms(all_sms);
  device->capability = static_cast<int32_t>(word >> 16 & 0xffff);
  device->shared_bytes = static_cast<int32_t>(word >> 32);
  // Code for 9.0a runs on 9.0 only, not on newer GPUs.
  device->wgmma = SQK_WITH_SM90 && device->capability == 90;
  device->part = device->sms < all_sms;
  return Status::kSuccess;
}

}  // namespace sqk

extern "C" int32_t sqk_device(sqk::Device* device) {
  return static_cast<int32_t>(sqk::current_device(device));
}
