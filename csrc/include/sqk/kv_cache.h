// An int8 cache of keys and values, and its writer. Public ring: no torch, no CUTLASS, compiles
// with a plain C++ compiler.
#pragma once

#include <cstdint>

#include "sqk/dtype.h"
#include "sqk/status.h"

namespace sqk {

// The channels of a head are padded with zeros to a multiple of this, so that the rows of a cache
// can be copied by 16 bytes.
constexpr int64_t kHeadMultiple = 16;
constexpr int64_t kMaxHead = 256;

constexpr int64_t padded_head(int64_t dim) {
  return (dim + kHeadMultiple - 1) / kHeadMultiple * kHeadMultiple;
}

// One half of a cache: k or v. data [blocks, heads, block_size, padded_head(dim)], and a scale for
// each token and head, or null for static scales. Tokens of a head are adjacent; strides are in
// elements. Blocks and heads start at a multiple of 16 bytes where the kernels run on a GPU.
struct KvHalf {
  int8_t* data;
  int64_t block_stride, head_stride;
  float* scale;
  int64_t scale_block_stride, scale_head_stride;
  int64_t dim;  // channels of a head, 1 to kMaxHead
};

// Position p of sequence b is slot p % block_size of block table[b * table_stride + p /
// block_size], or without a table slot p of block b. A ring (never with a table) has slot p %
// block_size: it keeps the newest block_size tokens.
struct KvCache {
  KvHalf k, v;
  int64_t blocks, heads, block_size;
  const int32_t* table;  // or null
  int64_t table_stride;  // entries of a sequence
  int32_t ring;          // 0 or 1
};

// Positions of a sequence that fit.
constexpr int64_t capacity(const KvCache& cache) {
  return cache.block_size * (cache.table != nullptr ? cache.table_stride : 1);
}

// New tokens [batch, heads, tokens, dim] of one half. Channels are adjacent.
struct KvTokens {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;  // elements
  const float* inv_smooth;                          // [heads, dim] or null
};

struct KvAppendParams {
  DType dtype;  // of k and v
  int64_t batch, tokens;
  KvTokens k, v;
  KvCache cache;             // its data and scales are written
  const int32_t* positions;  // [batch], of the first new token; null: 0
  // [batch or 1, tokens, rope_dim] each, or null; rope_batch_stride is 0 for one of all sequences.
  const void* cos;
  const void* sin;
  DType rope_dtype;
  int64_t rope_dim;  // even, <= cache.k.dim
  int64_t cos_batch_stride, cos_token_stride;
  int64_t sin_batch_stride, sin_token_stride;
  int32_t rotation;  // fits_rotation(rotation, dim) of both halves; 0 with static scales
};

// Writes the tokens whose position and block exist; the others are left out. Safe to capture in a
// CUDA graph. On a CPU the stream is that of cpu/threads.h.
Status kv_append(const KvAppendParams& params, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++. A null stream is the default stream.
extern "C" SQK_EXPORT int32_t sqk_kv_append(const sqk::KvAppendParams* params, void* stream);
