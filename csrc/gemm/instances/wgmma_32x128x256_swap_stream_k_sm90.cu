// Kernel ring: no torch.
#define SQK_OVERLAP 0
#include "gemm/instances/wgmma.cuh"

namespace sqk {
template WgmmaEntry wgmma_entry<wgmma(32, 128, 256).swap_ab().stream_k().stages(5)>();
}
