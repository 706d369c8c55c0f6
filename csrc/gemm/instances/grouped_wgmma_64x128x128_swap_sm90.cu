// Kernel ring: no torch.
#include "gemm/instances/grouped_wgmma.cuh"

namespace sqk {
template GroupedLaunch grouped_wgmma_entry<wgmma(64, 128, 128).swap_ab().cooperative().stages(9)>();
}
