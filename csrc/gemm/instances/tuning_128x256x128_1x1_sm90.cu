// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(128, 256, 128).cooperative().stages(4)>();
}
