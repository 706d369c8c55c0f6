// The C functions that describe the kernels and make plans, of a loaded library or of this module.
// Python ring: no torch, no CUDA.
#pragma once

#include <string>

#include "description.h"
#include "sqk/device.h"
#include "sqk/gemm.h"
#include "sqk/quantize.h"

namespace sqk {

// The types come from the declarations, so a call that does not fit them does not compile.
struct Entries {
  decltype(&sqk_gemm_table) gemm_table;
  decltype(&sqk_gemm_is_excluded) gemm_is_excluded;
  decltype(&sqk_gemm_plan) gemm_plan;
  decltype(&sqk_device) device;
  decltype(&sqk_gemm_use_measured) gemm_use_measured;
  decltype(&sqk_gemm_without_tiles) gemm_without_tiles;
  decltype(&sqk_quantize_rules) quantize_rules;
  decltype(&sqk_quantize_plan) quantize_plan;
};

// The functions of the module's own copy of csrc's plain C++. The copy knows no GPU and has its own
// state: it has no measured choices, and it reads SQK_WITHOUT_TILES at its first plan.
Entries own_entries();

// The functions of a library, which stays loaded. Throws std::runtime_error if it does not load or
// lacks a function.
Entries entries_of(const std::string& library);

}  // namespace sqk
