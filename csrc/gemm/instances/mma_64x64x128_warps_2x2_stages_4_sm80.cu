// Kernel ring: no torch.
#include "gemm/instances/mma.cuh"

namespace sqk {
template GemmLaunch mma_entry<mma(64, 64, 128).warps(2, 2).stages(4)>();
}
