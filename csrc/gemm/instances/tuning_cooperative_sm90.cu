// Candidates of table_sm90.h, for the tuner: cooperative. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_candidate.cuh"

namespace sqk {

WgmmaEntry wgmma_candidate_cooperative(int32_t tile) { return find_candidate<3, 4, 5>(tile); }

}  // namespace sqk
