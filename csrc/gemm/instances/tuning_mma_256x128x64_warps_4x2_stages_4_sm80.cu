// Kernel ring: no torch.
#include "gemm/instances/mma.cuh"

namespace sqk {
template GemmLaunch mma_entry<mma(256, 128, 64).warps(4, 2).stages(4)>();
}
