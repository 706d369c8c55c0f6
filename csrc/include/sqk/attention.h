// Attention of a few tokens to an int8 cache. Public ring: no torch, no CUTLASS, compiles with a
// plain C++ compiler.
#pragma once

#include <cstdint>

#include "sqk/device.h"
#include "sqk/dtype.h"
#include "sqk/kv_cache.h"
#include "sqk/status.h"

namespace sqk {

// The most query tokens of a sequence.
constexpr int64_t kMaxQueryTokens = 8;

struct AttentionParams {
  DType dtype;                   // of q and y
  int64_t batch, heads, tokens;  // of q; cache.heads divides heads; tokens <= kMaxQueryTokens
  const void* q;                 // [batch, heads, tokens, cache.k.dim], adjacent channels
  int64_t q_batch_stride, q_head_stride, q_token_stride;  // elements
  void* y;  // [batch, heads, tokens, cache.v.dim], contiguous; cache.v.dim == cache.k.dim

  KvCache cache;           // only read
  const int32_t* lengths;  // [batch], new tokens included; null: capacity(cache)
  float scale;             // of the scores
  const float* k_smooth;   // [cache.heads, dim] or null; without cache.k.scale the static scales
  const float* v_smooth;
  int32_t rotation;
  int64_t window;  // 0: none

  // [batch or 1, heads or 1, tokens, capacity] of 0 and 1, or null; a stride of 0 repeats. Column 0
  // is position 0, or of a ring that has wrapped around the oldest token.
  const uint8_t* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_token_stride, mask_column_stride;

  void* workspace;  // plan.workspace_bytes, aligned to 16; need not be cleared
  int64_t workspace_bytes;
};

// What a call does, from its sizes alone: never from lengths, so that one CUDA graph serves all.
struct AttentionPlan {
  int32_t splits;   // parts of the sequence, merged in a fixed order
  int32_t threads;  // per block; on a CPU, tasks
  int64_t blocks;   // of the launch
  int64_t shared_bytes;
  int64_t workspace_bytes;
};

// Pure arithmetic: no GPU is touched. kInvalidArgument: the comments above rule it out.
Status plan_attention(const AttentionParams& params, const Device& device, AttentionPlan* plan);

// The plan on the current GPU.
Status plan(const AttentionParams& params, AttentionPlan* plan);

// Launches on the current GPU, for which `plan` was made. Allocates nothing and does not wait: safe
// to capture in a CUDA graph.
Status decode_attention_s8(const AttentionParams& params, const AttentionPlan& plan,
                           cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++. A null stream is the default stream.
extern "C" SQK_EXPORT int32_t sqk_decode_attention_s8(const sqk::AttentionParams* params,
                                                      void* stream);
extern "C" SQK_EXPORT int64_t sqk_attention_workspace_bytes(const sqk::AttentionParams* params);
// On a described GPU, or with null on the current one. Not in the library of the CPU kernels.
extern "C" SQK_EXPORT int32_t sqk_attention_plan(const sqk::AttentionParams* params,
                                                 const sqk::Device* device,
                                                 sqk::AttentionPlan* plan);
