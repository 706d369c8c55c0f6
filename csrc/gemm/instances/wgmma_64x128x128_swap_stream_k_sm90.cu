// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(64, 128, 128).swap_ab().stream_k().stages(9)>();
}
