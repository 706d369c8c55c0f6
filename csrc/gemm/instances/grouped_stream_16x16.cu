// Kernel ring: no torch.
#include "gemm/instances/grouped_stream.cuh"

namespace sqk {
template GroupedLaunch grouped_stream_entry<stream(16, 16)>();
}
