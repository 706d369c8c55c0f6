// Where the compiled GEMM kernels are found. Kernel ring: no torch.
//
// Each tile of a table has a file in instances/, which names the tile as the table does. A row
// without a file does not link; a file without a row does not compile.
#pragma once

#include "gemm/tiles/builder.h"
#include "sqk/quantize.h"

namespace sqk {

// Launches the plan's kernels on the current GPU; the plan fits the params.
using GemmLaunch = Status (*)(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t);

// The kernel of a streaming tile for activations of this type; int8: x_q is given.
struct StreamParams;
using StreamKernel = void (*)(StreamParams);
using StreamKernels = StreamKernel (*)(DType x);

// A wgmma kernel's launcher, and the workspace that CUTLASS wants for it.
struct WgmmaEntry {
  GemmLaunch launch = nullptr;
  int64_t (*workspace_bytes)(const GemmParams&, const Device&) = nullptr;
};

// instances/stream_*.cu, for all architectures.
template <TileKey kTile>
StreamKernels stream_entry();

// instances/mma_*_sm80.cu, where an architecture without wgmma was built (SQK_WITH_SM80).
template <TileKey kTile>
GemmLaunch mma_entry();

// instances/wgmma_*_sm90.cu, where 9.0a was built (SQK_WITH_SM90).
template <TileKey kTile>
WgmmaEntry wgmma_entry();

// stream/launch.cu: `tile` is of kind kStream and `kernels` are its own. With `quantize` the
// activations are its x, which the kernel quantizes itself; params.x_q and x_scale are then not
// read.
Status launch_stream(const GemmParams& params, const QuantizeParams* quantize, const Device& device,
                     const GemmTile& tile, StreamKernels kernels, cudaStream_t stream);
// Whether launch_stream takes this quantizer.
bool stream_quantizes(const QuantizeParams& quantize, const GemmParams& params);

}  // namespace sqk
