// What a lane multiplies at a time: a chunk of its two rows of weights, and the activations that it
// meets. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "gemm/w4/unpack.cuh"

namespace sqk {

// w of channels g and g + 8 of the tile, x of tokens g and g + 8.
template <int kGroups, bool kW4>
struct StreamChunk;

// 64 elements of k.
template <int kGroups>
struct StreamChunk<kGroups, false> {
  static constexpr int kParts = 1;  // chunks of activations
  uint4 w[2];
  uint4 x[kParts][kGroups];

  __device__ void multiply(int32_t* acc) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint4& v = x[0][group];
      multiply_add(acc + 4 * group, {w[0].x, w[1].x, w[0].y, w[1].y}, {v.x, v.y});
      multiply_add(acc + 4 * group, {w[0].z, w[1].z, w[0].w, w[1].w}, {v.z, v.w});
    }
  }
};

// A group of weights of 4 bits: a word holds both of a fragment's words of its row.
template <int kGroups>
struct StreamChunk<kGroups, true> {
  static constexpr int kParts = 2;
  uint4 w[2];
  uint4 x[kParts][kGroups];
  uint32_t pair[2];  // step and offset

  __device__ void multiply(int32_t* acc) const {
    constexpr uint32_t kSign = 0x8000;  // adds 128 to the offset
    const W4Scale scale[2] = {W4Scale::of<0>(pair[0] ^ kSign), W4Scale::of<0>(pair[1] ^ kSign)};
    const uint32_t words[4][2] = {
        {w[0].x, w[1].x}, {w[0].y, w[1].y}, {w[0].z, w[1].z}, {w[0].w, w[1].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) unpack_w4(words[i][h], scale[h], a[h], a[2 + h]);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4& v = x[i / 2][group];
        multiply_add(acc + 4 * group, a, {i % 2 == 0 ? v.x : v.z, i % 2 == 0 ? v.y : v.w});
      }
    }
  }
};

}  // namespace sqk
