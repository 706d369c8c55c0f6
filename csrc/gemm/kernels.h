// Where the compiled GEMM kernels are found. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/tile.h"
#include "sqk/quantize.h"

namespace sqk {

// Launches the plan's kernels on the current GPU; the plan fits the params.
using GemmLaunch = Status (*)(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t);

// instances/stream.cu: `tile` is of kind kStream. With `quantize` the activations are its x, which
// the kernel quantises itself; params.x_q and x_scale are then not read.
Status launch_stream(const GemmParams& params, const QuantizeParams* quantize, const Device& device,
                     const GemmTile& tile, cudaStream_t stream);
// Whether launch_stream takes this quantiser.
bool stream_quantizes(const QuantizeParams& quantize, const GemmParams& params);

// instances/mma_*_sm80.cu, where an architecture without wgmma was built (SQK_WITH_SM80); nullptr
// for a row that is of another kind.
GemmLaunch mma_launch(GemmTable table, int32_t tile);

// A tile of Hopper's table: its launcher, and the workspace that CUTLASS wants for it.
struct WgmmaEntry {
  GemmLaunch launch = nullptr;
  int64_t (*workspace_bytes)(const GemmParams&, const Device&) = nullptr;
};

// The kernel of a kWgmma row of Hopper's table, where 9.0a was built (SQK_WITH_SM90). Each row has
// a file of its own: instances/wgmma_*_sm90.cu, or tuning_*_sm90.cu for a candidate. A row without
// one does not link.
template <int kRow>
WgmmaEntry wgmma_row();

// instances/tuning_mma_sm80.cu: the candidates, in a tuning build (SQK_TUNING).
GemmLaunch mma_candidate(GemmTable table, int32_t tile);

}  // namespace sqk
