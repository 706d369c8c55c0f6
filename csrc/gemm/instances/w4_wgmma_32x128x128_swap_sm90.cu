// Kernel ring: no torch.
#include "gemm/instances/w4_wgmma.cuh"

namespace sqk {
template WgmmaEntry w4_wgmma_entry<wgmma(32, 128, 128).swap_ab().cooperative().stages(18)>();
}
