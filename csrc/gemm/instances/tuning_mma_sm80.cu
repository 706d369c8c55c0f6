// Candidates of table_sm80.h and table_sm89.h, for the tuner. Kernel ring: no torch.
#include "gemm/mma_rows.cuh"
#include "gemm/tiles/sm80.h"
#include "gemm/tiles/sm89.h"

namespace sqk {

GemmLaunch mma_candidate(GemmTable table, int32_t tile) {
  switch (table) {
    case GemmTable::kSm80:
      return find_launch<kSm80Candidates>(tile - int64_t{std::size(kSm80Shipped)});
    case GemmTable::kSm89:
      return find_launch<kSm89Candidates>(tile - int64_t{std::size(kSm89Shipped)});
    case GemmTable::kSm90:
      return nullptr;
  }
  return nullptr;
}

}  // namespace sqk
