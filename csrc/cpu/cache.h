// Where the tokens of an int8 cache are. CPU ring: no torch, no CUDA.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "sqk/kv_cache.h"
#include "sqk/quantize.h"

namespace sqk {

// The files of the levels include this. What is inlined always cannot be linked with another level's
// instructions.
#define SQK_INLINE inline __attribute__((always_inline))

// Adjacent slots of a block, which hold adjacent positions of a sequence.
struct Slots {
  int64_t block, first, count;

  SQK_INLINE int8_t* at(const KvHalf& half, int64_t head) const {
    return half.data + block * half.block_stride + head * half.head_stride +
           first * padded_head(half.dim);
  }
  SQK_INLINE float* scale(const KvHalf& half, int64_t head) const {
    if (half.scale == nullptr) return nullptr;
    return half.scale + block * half.scale_block_stride + head * half.scale_head_stride + first;
  }
};

// The slots from a position on, `most` at most and 1 at least. The block may be one that does not
// exist: an entry of the table that nobody has checked.
SQK_INLINE Slots slots_of(const KvCache& cache, int64_t sequence, int64_t position, int64_t most) {
  const int64_t first = position % cache.block_size;
  const int64_t left = cache.block_size - first;
  const int64_t block =
      cache.table == nullptr
          ? sequence
          : cache.table[sequence * cache.table_stride + position / cache.block_size];
  return {block, first, left < most ? left : most};
}

inline bool is_valid(const KvHalf& half, bool rotates) {
  return half.dim >= 1 && half.dim <= kMaxHead && (!rotates || half.scale != nullptr);
}

// What the comments of kv_cache.h say of a cache of `batch` sequences.
inline bool is_valid(const KvCache& cache, int64_t batch, int32_t rotation) {
  const bool empty = cache.blocks * cache.heads * cache.block_size == 0;
  return cache.heads >= 1 && cache.blocks >= 0 && cache.block_size >= 0 &&
         is_valid(cache.k, rotation != 0) && is_valid(cache.v, rotation != 0) &&
         fits_rotation(rotation, cache.k.dim) && fits_rotation(rotation, cache.v.dim) &&
         (cache.k.scale == nullptr) == (cache.v.scale == nullptr) &&
         (empty || (cache.k.data != nullptr && cache.v.data != nullptr)) &&
         (cache.table == nullptr ? cache.blocks >= batch
                                 : cache.ring == 0 && cache.table_stride >= 0);
}

}  // namespace sqk
