// One INT8 GEMM for each expert of a mixture, in one launch, and the weighted sums of their
// results. Public ring: no torch, no CUTLASS, compiles with a plain C++ compiler.
//
//   y[r, :] for offsets[e] <= r < offsets[e + 1]:
//     acc[n] = sum over k of x_q[rows[r], k] * w_q[e, n, k]              exact, int32
//     y[r, n] = fma(acc[n] * w_scale[e, n], x_scale[r], bias[e, n])      float32, rounded once
//   y[r, :] = 0 for all other rows
//
//   out[t, :] = fma(weights[t, c], y[position[t, c], :], ...)  for c = 0, 1, ...   float32, rounded
//                                                                                  once
#pragma once

#include <cstdint>

#include "sqk/dtype.h"
#include "sqk/status.h"

namespace sqk {

constexpr int64_t kMaxExperts = 1024;

// The offsets and rows are on the device, and no launch waits for them. Values that are out of
// range or not ascending give undefined results, but nothing outside the arrays is read or written.
// Strides are in elements; within a row elements are adjacent.
struct GroupedParams {
  int64_t m;        // rows of y; 0 is allowed
  int64_t n;        // output channels, >= 1
  int64_t k;        // 1 .. kMaxGemmK
  int64_t experts;  // 1 .. kMaxExperts

  const int8_t* x_q;  // [x_rows, k]
  int64_t x_rows;     // m without `rows`
  int64_t x_q_stride;
  const int32_t* rows;     // [m]: the row of x_q for each row of y; null: the same
  const int32_t* offsets;  // [experts + 1], ascending, in [0, m]
  const int8_t* w_q;       // [experts, n, k]
  int64_t w_q_stride;      // between channels
  int64_t w_q_expert_stride;
  const float* x_scale;  // [m] or [1]
  int32_t x_per_token;   // 1: x_scale is [m]
  const float* w_scale;  // [experts, n]
  const float* bias;     // [experts, n] or null

  void* y;  // [m, n] of y_dtype
  int64_t y_stride;
  DType y_dtype;  // a float

  int32_t tile;        // a row of the table of grouped tiles, or -1: chosen
  int32_t w_constant;  // as in GemmParams

  void* workspace;  // GroupedPlan::workspace_bytes, aligned to 16; need not be cleared
  int64_t workspace_bytes;
};

struct GroupedPlan {
  int32_t tile;           // row of the table of grouped tiles; on a CPU: the level
  int32_t launches;       // kernels; 0 for m = 0
  int32_t overlap;        // as in GemmPlan
  int32_t weights_first;  // as in GemmPlan
  int64_t blocks;         // launched
  int64_t shared_bytes;   // dynamic, per block
  int64_t workspace_bytes;
};

// The plan on the current GPU, or on a CPU for the level in use.
Status plan(const GroupedParams& params, GroupedPlan* plan);

// Launches on the current GPU, for which `plan` was made. Allocates nothing and does not wait: safe
// to capture in a CUDA graph.
Status grouped_gemm_s8(const GroupedParams& params, const GroupedPlan& plan, cudaStream_t stream);

struct CombineParams {
  int64_t tokens;   // rows of out; 0 is allowed
  int64_t choices;  // of each token, >= 1
  int64_t n;        // channels, >= 1
  int64_t y_rows;

  const void* y;  // [y_rows, n] of dtype
  int64_t y_stride;
  const int32_t*
      position;         // [tokens, choices], dense: rows of y; out of range: as in GroupedParams
  const void* weights;  // [tokens, choices] of weights_dtype, dense
  void* out;            // [tokens, n] of dtype
  int64_t out_stride;
  DType dtype;          // a float
  DType weights_dtype;  // a float
};

Status combine_experts(const CombineParams& params, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++, as in gemm.h.
extern "C" SQK_EXPORT int32_t sqk_grouped_gemm_s8(const sqk::GroupedParams* params, void* stream);
extern "C" SQK_EXPORT int32_t sqk_grouped_plan(const sqk::GroupedParams* params,
                                               sqk::GroupedPlan* plan);
extern "C" SQK_EXPORT int32_t sqk_combine_experts(const sqk::CombineParams* params, void* stream);
