// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(64, 64, 256).swap_ab().pingpong().stages(7)>();
}
