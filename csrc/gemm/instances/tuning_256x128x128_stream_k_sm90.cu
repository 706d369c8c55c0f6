// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(256, 128, 128).stream_k().cluster(1, 2).stages(4)>();
}
