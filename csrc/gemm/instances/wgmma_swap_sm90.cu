// Rows of table_sm90.h for few tokens. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_kernel.cuh"

namespace sqk {

WgmmaEntry wgmma_swap(int32_t tile) {
  switch (tile) {
    case 2:
      return {&WgmmaGemm<2>::launch, &WgmmaGemm<2>::workspace_bytes};
    case 3:
      return {&WgmmaGemm<3>::launch, &WgmmaGemm<3>::workspace_bytes};
    case 5:
      return {&WgmmaGemm<5>::launch, &WgmmaGemm<5>::workspace_bytes};
    default:
      return {};
  }
}

}  // namespace sqk
