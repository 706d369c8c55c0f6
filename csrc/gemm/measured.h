// Tiles that were fastest when measured on this GPU. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/tile.h"

namespace sqk {

// Whether any measured choices are set.
bool has_measured();

// The choice for these sizes on a GPU with this table and this many multiprocessors, or nullptr. Of
// the rows with this n and k it takes the one with the smallest m that is at least `m`, if that is
// less than 2 m. If all are smaller, it takes the largest, provided that it was measured with many
// tokens.
const GemmMeasured* find_measured(GemmTable table, int32_t sms, int64_t m, int64_t n, int64_t k);

// Like plan_gemm, but uses only the table's rules.
Status plan_by_rules(const GemmParams& params, const Device& device, GemmPlan* plan);

}  // namespace sqk
