// Kernel ring: no torch.
#include "gemm/instances/mma.cuh"

namespace sqk {
template GemmLaunch mma_entry<mma(128, 256, 64).warps(2, 4).stages(4)>();
}
