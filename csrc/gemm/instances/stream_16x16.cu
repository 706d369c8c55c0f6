// Kernel ring: no torch.
#include "gemm/instances/stream.cuh"

namespace sqk {
template StreamKernels stream_entry<stream(16, 16)>();
}
