// Kernel ring: no torch.
#include "gemm/instances/w4_wgmma.cuh"

namespace sqk {
template WgmmaEntry
w4_wgmma_entry<wgmma(256, 128, 128).swap_ab().cooperative().cluster(1, 2).stages(5)>();
}
