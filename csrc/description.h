// The functions that describe the library to smoothquant_kernels._kernels (csrc/python), which is
// compiled with the same headers. Kernel ring: no torch.
#pragma once

#include "gemm/tiles/tile.h"
#include "quantize/table.h"

// The table with this number, or null if there is none. Never freed.
extern "C" SQK_EXPORT const sqk::GemmTableView* sqk_gemm_table(int32_t table);
// 1 if SQK_WITHOUT_TILES or sqk_gemm_without_tiles rules out this row now.
extern "C" SQK_EXPORT int32_t sqk_gemm_is_excluded(int32_t table, int32_t row);
// The rules of the paths, from the first to the last; never freed.
extern "C" SQK_EXPORT const sqk::PathRule* sqk_quantize_rules(int32_t* count);
