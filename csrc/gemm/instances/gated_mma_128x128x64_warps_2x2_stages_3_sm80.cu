// Kernel ring: no torch.
#include "gemm/instances/mma.cuh"

namespace sqk {
template GemmLaunch gated_mma_entry<mma(128, 128, 64).warps(2, 2).stages(3)>();
}
