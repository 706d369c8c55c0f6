// Cooperative rows of table_sm90.h. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_kernel.cuh"

namespace sqk {

WgmmaEntry wgmma_large(int32_t tile) {
  switch (tile) {
    case 10:
      return {&WgmmaGemm<10>::launch, &WgmmaGemm<10>::workspace_bytes};
    case 11:
      return {&WgmmaGemm<11>::launch, &WgmmaGemm<11>::workspace_bytes};
    default:
      return {};
  }
}

}  // namespace sqk
