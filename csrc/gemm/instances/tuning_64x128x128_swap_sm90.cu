// "64x128x128 swap" of candidates_sm90.h, for the tuner. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_kernel.cuh"

template sqk::WgmmaEntry sqk::wgmma_row<sqk::row_of("64x128x128 swap")>();
