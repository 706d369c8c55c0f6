// The whole linear layer: quantize x, then multiply. Public ring: no torch, no CUTLASS, compiles
// with a plain C++ compiler.
#pragma once

#include <cstdint>

#include "sqk/gemm.h"
#include "sqk/quantize.h"
#include "sqk/status.h"

namespace sqk {

// quantize.x -> quantize.x_q, quantize.x_scale -> gemm.y, with the same m and k in both. gemm's
// x_q, its stride, x_scale and x_per_token are not read. With few tokens and no norm or activation
// before the quantization, one launch does both (plan.fused); quantize.x_q and quantize.x_scale may
// then be null.
struct LinearParams {
  QuantizeParams quantize;
  GemmParams gemm;
};

struct LinearPlan {
  QuantizePlan quantize;  // empty where fused
  GemmPlan gemm;
  int32_t fused;
  int64_t workspace_bytes;  // the quantizer and the GEMM use it in turn; linear.gemm.workspace
};

// The plan on the current GPU.
Status plan(const LinearParams& params, LinearPlan* plan);

// Launches on the current GPU, for which `plan` was made. Allocates nothing and does not wait: safe
// to capture in a CUDA graph.
Status linear_s8(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++. A null stream is the default stream.
extern "C" SQK_EXPORT int32_t sqk_linear_s8(const sqk::LinearParams* params, void* stream);
extern "C" SQK_EXPORT int32_t sqk_linear_plan(const sqk::LinearParams* params,
                                              sqk::LinearPlan* plan);
