// Candidates of table_sm90.h, for the tuner: few tokens. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_candidate.cuh"

namespace sqk {

WgmmaEntry wgmma_candidate_swap(int32_t tile) { return find_candidate<6, 7, 8>(tile); }

}  // namespace sqk
