// "128x128x128" of table_sm90.h. Kernel ring: no torch.
#define SQK_OVERLAP 1
#include "gemm/wgmma_kernel.cuh"

template sqk::WgmmaEntry sqk::wgmma_row<sqk::row_of("128x128x128")>();
