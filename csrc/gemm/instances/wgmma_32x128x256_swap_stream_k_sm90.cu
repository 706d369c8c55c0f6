// "32x128x256 swap stream-K" of table_sm90.h. Kernel ring: no torch.
#define SQK_OVERLAP 0
#include "gemm/wgmma_kernel.cuh"

template sqk::WgmmaEntry sqk::wgmma_row<sqk::row_of("32x128x256 swap stream-K")>();
