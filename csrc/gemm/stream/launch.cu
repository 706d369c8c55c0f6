// Launches the streaming GEMM for few tokens. Kernel ring: no torch.
#include <algorithm>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "gemm/kernels.h"
#include "gemm/stream/layout.h"
#include "gemm/stream/params.cuh"
#include "gemm/stream/shape.h"
#include "gemm/tiles/tile.h"

namespace sqk {
namespace {

// Every block reads all of x from L2 and quantizes it, while its first weights arrive. On an H100 a
// full ring keeps the memory busy for some 6500 clocks, and 16 warps quantize this many elements in
// about 6000. With more elements, a separate launch of the quantizer (2 or 3 us) costs less. The
// size of the weights does not matter: there is one block per SM, not per tile, so x is read 132
// times, not n / 16 times. A rotation of groups of 256 doubles the instructions, but for the
// longest rows the 2 us by which they then outlast the ring are still no more than a launch takes.
constexpr int64_t kMostQuantized = 40 * 1024;

}  // namespace

bool stream_quantizes(const QuantizeParams& quantize, const GemmParams& params) {
  const bool given = quantize.scheme != Scheme::kStatic || quantize.scale != nullptr;
  return quantize.producer == Producer::kQuantize && is_float(quantize.dtype) && given &&
         quantize.x != nullptr && quantize.m == params.m && quantize.k == params.k &&
         params.m >= 1 && params.m <= 2 * kGroupTokens && params.m * params.k <= kMostQuantized;
}

Status launch_stream(const GemmParams& params, const QuantizeParams* quantize, const Device& device,
                     const GemmPlan& plan, StreamKernels kernels, cudaStream_t stream) {
  const GemmTile& tile = gemm_table(plan.table).tiles[plan.tile];
  const int groups = tile.m > kGroupTokens ? 2 : 1;
  const bool w4 = is_w4(params);
  if (!stream_serves(kGroupTokens * groups, params, device)) return Status::kUnsupportedShape;
  const bool quantizes = quantize != nullptr;
  if (quantizes && !stream_quantizes(*quantize, params)) return Status::kUnsupportedShape;
  const StreamLaunch launch = choose_launch(params, quantizes, groups, tile.warps_n, device);
  if (launch.blocks == 0) return Status::kUnsupportedShape;

  StreamParams p = {};
  p.epilogue = make_epilogue(params);
  p.w_q = params.w_q;
  // A single row may have any stride, but lanes beyond it still need an aligned address.
  p.w_q_stride = params.n > 1 ? params.w_q_stride : 0;
  p.k = static_cast<int32_t>(params.k);
  p.stages = static_cast<int32_t>(stream_stages(params.k, w4));
  p.tiles = static_cast<int32_t>(divide_up(params.n, kStreamChannels));
  p.activation_bytes = static_cast<int32_t>(launch.activation_bytes);
  p.resident = launch.resident;
  p.weights_first = plan.overlap && plan.weights_first && launch.resident;
  if (quantizes) {
    p.x = quantize->x;
    p.x_stride = quantize->x_stride;
    p.rotation = quantize->rotation;
    p.inv_smooth = quantize->inv_smooth;
    p.scale = quantize->scale;
    p.scheme = quantize->scheme;
    const int64_t size = size_in_bytes(quantize->dtype);
    p.wide = params.k * size % 16 == 0 && are_rows_aligned(p.x, p.x_stride * size, params.m, 16) &&
             is_aligned(p.inv_smooth, 16);
  } else {
    p.x_q = params.x_q;
    p.x_q_stride = params.m > 1 ? params.x_q_stride : 0;
  }

  if (w4) {
    p.w_group = params.w_group;
    p.w_group_end = params.w_group + 2 * w4_groups(params.k) * params.n;
    p.w_bytes = static_cast<int32_t>(kW4Bytes * w4_groups(params.k));
  }

  const DType type = quantizes ? quantize->dtype : DType::kInt8;
  const StreamKernel kernel = kernels(type);
  KernelLaunch config = {};
  config.function = reinterpret_cast<const void*>(kernel);
  config.grid = dim3(static_cast<unsigned>(launch.blocks));
  config.block = dim3(static_cast<unsigned>(32 * launch.warps));
  config.shared_bytes = launch.shared_bytes;
  config.stream = stream;
  config.overlap = plan.overlap;
  // One entry per kernel, because all kernels are launched here. choose_launch fills the shared
  // memory with one block or several.
  static DevicesSeen seen[2][2][kDTypes];
  const Status status = allow_shared_memory(config.function, device.shared_bytes, 1,
                                            seen[w4][groups - 1][static_cast<int>(type)]);
  return status == Status::kSuccess ? launch_kernel(config, &p) : status;
}

}  // namespace sqk
