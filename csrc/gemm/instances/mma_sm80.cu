// The mma.sync GEMMs of both tables. Kernel ring: no torch.
#include "gemm/mma_rows.cuh"
#include "gemm/tiles/sm80.h"
#include "gemm/tiles/sm89.h"

namespace sqk {

GemmLaunch mma_launch(GemmTable table, int32_t tile) {
  switch (table) {
    case GemmTable::kSm80:
      return find_launch<kSm80Shipped>(tile);
    case GemmTable::kSm89:
      return find_launch<kSm89Shipped>(tile);
    case GemmTable::kSm90:
      return nullptr;
  }
  return nullptr;
}

}  // namespace sqk
