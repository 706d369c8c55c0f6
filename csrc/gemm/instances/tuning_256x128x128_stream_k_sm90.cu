// "256x128x128 stream-K" of candidates_sm90.h, for the tuner. Kernel ring: no torch.
#define SQK_OVERLAP 0
#include "gemm/wgmma_kernel.cuh"

template sqk::WgmmaEntry sqk::wgmma_row<sqk::row_of("256x128x128 stream-K")>();
