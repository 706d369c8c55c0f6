// The parameters of the streaming GEMM's kernel. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "gemm/epilogue/params.cuh"
#include "gemm/stream/layout.h"
#include "sqk/quantize.h"

namespace sqk {

struct StreamParams {
  Epilogue epilogue;
  const int8_t* w_q;
  int64_t w_q_stride;
  const int8_t* x_q;  // null: the activations are `x`, which the kernel quantizes
  int64_t x_q_stride;
  int32_t k;
  int32_t stages;            // per row
  int32_t tiles;             // of 16 channels
  int32_t activation_bytes;  // of shared memory
  bool resident;  // all of x_q is in shared memory; else a part comes with each stage of weights
  bool weights_first;  // GemmPlan::weights_first; only with resident activations

  const void* x;
  int64_t x_stride;
  int32_t rotation;  // as in QuantizeParams
  const float* inv_smooth;
  const float* scale;
  Scheme scheme;
  bool wide;  // rows of x and inv_smooth are whole vectors of 16 bytes, aligned to them

  // Only for weights of 4 bits, whose w_q_stride is in bytes too.
  const int8_t* w_group;
  const int8_t* w_group_end;
  int32_t w_bytes;  // of a row of w_q

  // What the GEMMs of experts have otherwise (gemm/grouped/stream.cuh).
  __device__ int first_tile() const { return blockIdx.x; }  // of this block
  __device__ int tile_step() const { return gridDim.x; }    // to its next one
  __device__ const int8_t* x_row(int token) const { return x_q + token * x_q_stride; }
};

}  // namespace sqk
