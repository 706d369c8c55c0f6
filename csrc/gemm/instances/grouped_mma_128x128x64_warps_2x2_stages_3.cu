// Kernel ring: no torch.
#include "gemm/instances/grouped_mma.cuh"

namespace sqk {
template GroupedLaunch grouped_mma_entry<mma(128, 128, 64).warps(2, 2).stages(3)>();
}
