// Kernel ring: no torch.
#include "gemm/instances/w4_mma.cuh"

namespace sqk {
template GemmLaunch w4_mma_entry<mma(128, 128, 128).warps(2, 2).stages(3)>();
}
