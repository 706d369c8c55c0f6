// Kernel ring: no torch.
#include "attention/instances/decode.cuh"

namespace sqk {
template DecodeKernel decode_kernel_for<128>(int columns);
}
