// Pingpong rows of table_sm90.h. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_kernel.cuh"

namespace sqk {

WgmmaEntry wgmma_middle(int32_t tile) {
  switch (tile) {
    case 7:
      return {&WgmmaGemm<7>::launch, &WgmmaGemm<7>::workspace_bytes};
    case 8:
      return {&WgmmaGemm<8>::launch, &WgmmaGemm<8>::workspace_bytes};
    default:
      return {};
  }
}

}  // namespace sqk
