// Kernel ring: no torch.
#include "gemm/instances/mma.cuh"

namespace sqk {
template GemmLaunch mma_entry<mma(16, 64, 128).warps(1, 4).stages(6)>();
}
