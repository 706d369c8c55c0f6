// Kernel ring: no torch.
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(32, 128, 256).swap_ab().stream_k().stages(5)>();
}
