// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(128, 128, 128).pingpong().cluster(2, 1).stages(7)>();
}
