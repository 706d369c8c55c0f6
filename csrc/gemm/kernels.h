// Declares the entries of the compiled GEMM kernels. Kernel ring: no torch.
//
// Each tile of a table has a file in instances/, which names the tile as the table does. A row
// without a file does not link; a file without a row does not compile.
#pragma once

#include "gemm/tiles/builder.h"
#include "sqk/quantize.h"

namespace sqk {

// Launches the plan's kernels on the current GPU. The plan was made for these params.
using GemmLaunch = Status (*)(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t);

// The kernel of a streaming tile for activations of this type. int8: x_q is given.
struct StreamParams;
using StreamKernel = void (*)(StreamParams);
using StreamKernels = StreamKernel (*)(DType x);

// A wgmma kernel's launcher, and the size of the workspace that CUTLASS needs for it.
struct WgmmaEntry {
  GemmLaunch launch = nullptr;
  int64_t (*workspace_bytes)(const GemmParams&, const Device&) = nullptr;
};

// instances/stream_*.cu, for all architectures.
template <TileKey kTile>
StreamKernels stream_entry();

// instances/w4_stream_*.cu, for rows that say .w4() or .w4_only().
template <TileKey kTile>
StreamKernels w4_stream_entry();

// instances/mma_*_sm80.cu, if the build has an architecture without wgmma (SQK_WITH_SM80).
template <TileKey kTile>
GemmLaunch mma_entry();

// instances/gated_mma_*_sm80.cu, for rows that say .gated().
template <TileKey kTile>
GemmLaunch gated_mma_entry();

// instances/w4_mma_*_sm80.cu, for rows that say .w4() or .w4_only().
template <TileKey kTile>
GemmLaunch w4_mma_entry();

// instances/wgmma_*_sm90.cu, if the build has 9.0a (SQK_WITH_SM90).
template <TileKey kTile>
WgmmaEntry wgmma_entry();

// instances/gated_wgmma_*_sm90.cu, for rows that say .gated().
template <TileKey kTile>
WgmmaEntry gated_wgmma_entry();

// instances/w4_wgmma_*_sm90.cu, for rows that say .w4() or .w4_only().
template <TileKey kTile>
WgmmaEntry w4_wgmma_entry();

// stream/launch.cu. The plan's tile is of kind kStream, and `kernels` are its kernels. With
// `quantize`, the kernel quantizes quantize->x itself and does not read params.x_q and x_scale.
Status launch_stream(const GemmParams& params, const QuantizeParams* quantize, const Device& device,
                     const GemmPlan& plan, StreamKernels kernels, cudaStream_t stream);
// Whether the streaming kernels can quantize x themselves.
bool stream_quantizes(const QuantizeParams& quantize, const GemmParams& params);

}  // namespace sqk
