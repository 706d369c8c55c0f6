// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(64, 256, 128).pingpong().cluster(2, 1).stages(5)>();
}
