// Kernel ring: no torch.
#include "gemm/instances/grouped_mma.cuh"

namespace sqk {
template GroupedLaunch grouped_mma_entry<mma(16, 64, 128).warps(1, 4).stages(6)>();
}
