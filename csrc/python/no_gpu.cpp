// What the library asks the CUDA runtime, for the module, which has none: no GPU is here. Python
// ring: no torch, no CUDA.
#include "sqk/gemm.h"
#include "sqk/quantize.h"

namespace sqk {

Status gemm_device(GemmDevice*) { return Status::kUnsupportedArch; }

Status quantize_device(QuantizeDevice*) { return Status::kUnsupportedArch; }

Status plan(const GemmParams&, GemmPlan*) { return Status::kUnsupportedArch; }

}  // namespace sqk

extern "C" int32_t sqk_gemm_device(sqk::GemmDevice* device) {
  return static_cast<int32_t>(sqk::gemm_device(device));
}
