// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(64, 128, 128).swap_ab().pingpong().stages(9)>();
}
