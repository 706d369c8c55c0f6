// Choices that were measured on the GPU that is there. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/tile.h"

namespace sqk {

// Whether there are any: else find_measured need not be asked.
bool has_measured();

// The choice for these sizes on a GPU with this table and as many multiprocessors, or nullptr: of
// the same n and k that of the smallest measured m that is not exceeded, if it is less than twice
// m; behind all of them, that of the largest if it was for many tokens.
const GemmMeasured* find_measured(GemmTable table, int32_t sms, int64_t m, int64_t n, int64_t k);

// As plan_gemm, by the table's rules alone.
Status plan_by_rules(const GemmParams& params, const Device& device, GemmPlan* plan);

}  // namespace sqk
