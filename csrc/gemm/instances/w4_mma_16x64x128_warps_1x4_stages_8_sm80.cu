// Kernel ring: no torch.
#include "gemm/instances/w4_mma.cuh"

namespace sqk {
template GemmLaunch w4_mma_entry<mma(16, 64, 128).warps(1, 4).stages(8)>();
}
