// The C interface that plans are made through, of a loaded library or of this module. Python ring:
// no torch, no CUDA.
#pragma once

#include <string>

#include "description.h"
#include "sqk/device.h"
#include "sqk/gemm.h"
#include "sqk/quantize.h"

namespace sqk {

// The types are those of the declarations: what does not fit them does not compile.
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

// Of csrc's plain C++, which the module holds a copy of. It knows no GPU and has a state of its
// own: no measured choices, and what SQK_WITHOUT_TILES said at its first plan.
Entries own_entries();

// Of a library, which stays loaded. Throws std::runtime_error: it does not load or lacks an entry.
Entries entries_of(const std::string& library);

}  // namespace sqk
