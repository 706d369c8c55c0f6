// Candidates of table_sm90.h, for the tuner: tiles shared over k. Kernel ring: no torch.
#define SQK_OVERLAP 0
#include "gemm/wgmma_candidate.cuh"

namespace sqk {

WgmmaEntry wgmma_candidate_stream_k(int32_t tile) { return find_candidate<9, 10, 11>(tile); }

}  // namespace sqk
