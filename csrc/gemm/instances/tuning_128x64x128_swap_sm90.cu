// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(128, 64, 128).swap_ab().pingpong().stages(9)>();
}
