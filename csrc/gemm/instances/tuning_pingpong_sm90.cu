// Candidates of table_sm90.h, for the tuner: pingpong. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_candidate.cuh"

namespace sqk {

WgmmaEntry wgmma_candidate_pingpong(int32_t tile) { return find_candidate<0, 1, 2>(tile); }

}  // namespace sqk
