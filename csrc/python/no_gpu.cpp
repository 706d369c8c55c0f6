// Replaces the functions that need the CUDA runtime, because the module is built without it: they
// report that there is no GPU. Python ring: no torch, no CUDA.
#include "sqk/device.h"
#include "sqk/gemm.h"

namespace sqk {

Status current_device(Device*) { return Status::kUnsupportedArch; }

Status plan(const GemmParams&, GemmPlan*) { return Status::kUnsupportedArch; }

}  // namespace sqk

extern "C" int32_t sqk_device(sqk::Device* device) {
  return static_cast<int32_t>(sqk::current_device(device));
}
