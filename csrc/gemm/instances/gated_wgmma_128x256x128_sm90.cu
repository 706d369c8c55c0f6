// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry gated_wgmma_entry<wgmma(128, 256, 128).cooperative().cluster(2, 1).stages(4)>();
}
