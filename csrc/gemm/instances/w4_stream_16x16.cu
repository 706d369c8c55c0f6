// Kernel ring: no torch.
#include "gemm/instances/w4_stream.cuh"

namespace sqk {
template StreamKernels w4_stream_entry<stream(16, 16)>();
}
