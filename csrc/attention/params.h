// The parameters of the attention kernel, its shapes and its shared memory, in plain C++: the plan
// needs no GPU. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/attention.h"

namespace sqk {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
// Tokens that a warp multiplies at once: two n8 tiles of the scores, one k16 step of the values.
constexpr int kTileTokens = 16;
constexpr int kChunkTokens = kDecodeWarps * kTileTokens;
// More are not supported, so that no sum of a position and a few tokens overflows.
constexpr int64_t kMostPositions = (int64_t{1} << 31) - 4 * kChunkTokens;

// What a block computes: `columns` queries of one head of keys, with heads of up to `dim` channels.
struct DecodeShape {
  int32_t dim;      // 64, 128 or 256
  int32_t columns;  // 8, or what 128 float32 sums a thread allow: 32, of 256 channels 16
};

// Tiles of a warp's ring. 2 to 4 blocks share a multiprocessor, so that 65 to 100 KiB are in
// flight on an A100 or H100, three to five times bandwidth times latency.
constexpr int decode_stages(int dim) { return dim == 64 ? 4 : dim == 128 ? 3 : 2; }
// Keys, values, and the scales of both.
constexpr int decode_stage_bytes(int dim) { return 2 * kTileTokens * (dim + 4); }
constexpr int decode_ring_bytes(int dim) { return decode_stages(dim) * decode_stage_bytes(dim); }
// The rings of the warps, then the quantized queries. The rings later hold the sums of the block.
constexpr int decode_shared_bytes(const DecodeShape& shape) {
  return kDecodeWarps * decode_ring_bytes(shape.dim) + shape.columns * shape.dim;
}

constexpr DecodeShape decode_shape(int64_t dim, int64_t columns) {
  const int32_t padded = dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  return {padded, columns <= 8 ? 8 : padded == 256 ? 16 : 32};
}
// Query heads of a head of keys, times tokens.
constexpr int64_t decode_columns(const AttentionParams& p) {
  return p.heads / p.cache.heads * p.tokens;
}
// Blocks of one split: sequences x heads x groups of columns.
constexpr int64_t decode_groups(const AttentionParams& p, const DecodeShape& shape) {
  return p.batch * p.cache.heads * divide_up(decode_columns(p), shape.columns);
}

// With splits > 1 the workspace has a ticket for each group, used only where common/tickets.h has
// none for the stream; then of each group, split and column the maximum and the sum of its weights;
// then its mean of the values.
constexpr int64_t decode_ticket_bytes(int64_t groups) {
  return round_up(4 * groups, kBufferAlignment);
}
constexpr int64_t decode_workspace_bytes(const DecodeShape& shape, int64_t groups, int32_t splits) {
  if (splits <= 1) return 0;
  return decode_ticket_bytes(groups) + 4 * groups * splits * shape.columns * (shape.dim + 2);
}

}  // namespace sqk
