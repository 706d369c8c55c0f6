// Kernel ring: no torch.
#include "gemm/instances/grouped_wgmma.cuh"

namespace sqk {
template GroupedLaunch grouped_wgmma_entry<wgmma(128, 128, 128).cooperative().stages(6)>();
}
