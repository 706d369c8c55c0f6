// Rows of table_sm90.h that share tiles over k. Kernel ring: no torch.
#define SQK_OVERLAP 0
#include "gemm/wgmma_kernel.cuh"

namespace sqk {

WgmmaEntry wgmma_stream_k(int32_t tile) {
  switch (tile) {
    case 4:
      return {&WgmmaGemm<4>::launch, &WgmmaGemm<4>::workspace_bytes};
    case 6:
      return {&WgmmaGemm<6>::launch, &WgmmaGemm<6>::workspace_bytes};
    case 9:
      return {&WgmmaGemm<9>::launch, &WgmmaGemm<9>::workspace_bytes};
    case 12:
      return {&WgmmaGemm<12>::launch, &WgmmaGemm<12>::workspace_bytes};
    default:
      return {};
  }
}

}  // namespace sqk
