// Exports the tables. Kernel ring: no torch, no GPU.
#include "description.h"

#include <iterator>

#include "gemm/excluded.h"

extern "C" const sqk::GemmTableView* sqk_gemm_table(int32_t table) {
  const bool exists = table >= 0 && table < sqk::kGemmTables;
  return exists ? &sqk::gemm_table(static_cast<sqk::GemmTable>(table)) : nullptr;
}

extern "C" int32_t sqk_gemm_is_excluded(int32_t table, int32_t row) {
  const sqk::Excluded* const excluded = sqk::excluded_tiles();
  return excluded != nullptr && excluded->has(static_cast<sqk::GemmTable>(table), row);
}

extern "C" const sqk::PathRule* sqk_quantize_rules(int32_t* count) {
  *count = static_cast<int32_t>(std::size(sqk::kPathRules));
  return sqk::kPathRules;
}
