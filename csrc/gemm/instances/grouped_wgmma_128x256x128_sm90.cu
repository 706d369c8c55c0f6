// Kernel ring: no torch.
#include "gemm/instances/grouped_wgmma.cuh"

namespace sqk {
template GroupedLaunch grouped_wgmma_entry<wgmma(128, 256, 128).cooperative().stages(4)>();
}
