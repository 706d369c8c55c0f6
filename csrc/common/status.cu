// Turns a Status into words. Kernel ring: no torch.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "common/status_text.h"
#include "sqk/gemm.h"
#include "sqk/status.h"

// The architectures of this build, such as 8.0+PTX/9.0a. The build sets it.
#ifndef SQK_ARCHS
#define SQK_ARCHS unknown
#endif
#define SQK_TEXT_OF(...) #__VA_ARGS__
#define SQK_TEXT(...) SQK_TEXT_OF(__VA_ARGS__)

namespace sqk {
namespace {

// For the two errors that a build for other architectures fixes.
constexpr char kUnsupportedArchText[] =
    "the library has no kernel for this GPU; it was built for " SQK_TEXT(SQK_ARCHS)  //
    "; name yours in TORCH_CUDA_ARCH_LIST (8.0+PTX serves any) and build again: "
    "SMOOTHQUANT_KERNELS_BUILD=cuda pip install --no-build-isolation --no-deps .";

}  // namespace

const char* describe(Status status) {
  if (const char* plain = plain_text(status)) return plain;
  thread_local char text[256];
  switch (status) {
    case Status::kUnsupportedArch:
      return kUnsupportedArchText;
    case Status::kExcludedTile:
      return "SQK_WITHOUT_TILES rules out the tile that was asked for, or every tile that serves "
             "this shape; name fewer rows";
    case Status::kUnknownTile:
      std::snprintf(text, sizeof text,
                    "SQK_WITHOUT_TILES names '%.60s', and no table has such a tile; write rows as "
                    "sm90/64x128x128, separated by commas (smoothquant-kernels doctor prints the "
                    "names), or unset it",
                    unknown_tile());
      return text;
    default:
      break;
  }
  if (!is_cuda_error(status)) {
    std::snprintf(text, sizeof text, "unknown status %d", static_cast<int>(status));
    return text;
  }
  const auto error = static_cast<cudaError_t>(static_cast<int32_t>(status) -
                                              static_cast<int32_t>(Status::kCudaBase));
  if (error == cudaErrorNoKernelImageForDevice) return kUnsupportedArchText;
  std::snprintf(text, sizeof text, "CUDA error %d (%s): %s", static_cast<int>(error),
                cudaGetErrorName(error), cudaGetErrorString(error));
  return text;
}

}  // namespace sqk
