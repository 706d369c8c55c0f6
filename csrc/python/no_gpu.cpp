// What the library asks the CUDA runtime, for the module, which has none: no GPU is here. Python
// ring: no torch, no CUDA.
#include "sqk/device.h"
#include "sqk/gemm.h"

namespace sqk {

Status current_device(Device*) { return Status::kUnsupportedArch; }

Status plan(const GemmParams&, GemmPlan*) { return Status::kUnsupportedArch; }

}  // namespace sqk

extern "C" int32_t sqk_device(sqk::Device* device) {
  return static_cast<int32_t>(sqk::current_device(device));
}
