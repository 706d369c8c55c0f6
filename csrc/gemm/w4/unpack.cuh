// Weights of 4 bits become int8 in registers: three instructions for four weights. Kernel ring: no
// torch.
//
// A weight is q * step + offset. Four of them are computed in one word, because none of
// q * step + offset + 128 leaves its byte: they are in [0, 255]. The last step subtracts the 128.
#pragma once

#include <cstdint>

namespace sqk {

// The step and the offset of a channel and a group of k, as the products need them.
struct W4Step {
  uint32_t step;     // in [0, 15]
  uint32_t shifted;  // step << 28
  uint32_t offset;   // offset + 128 in each byte
};

// `pair` has a step in its low byte and an offset in the next one, as w_group has them. What the
// upper half holds does not matter.
__device__ inline W4Step make_w4_step(uint32_t pair) {
  return {pair & 15, pair << 28, __byte_perm(pair, 0, 0x1111) ^ 0x80808080u};
}

// The weights of the low halves of a word's bytes.
__device__ inline uint32_t unpack_low(uint32_t word, const W4Step& s) {
  return ((word & 0x0f0f0f0fu) * s.step + s.offset) ^ 0x80808080u;
}

// Of the high halves. Their product with the step has 36 bits. The upper 32 bits of that with
// step << 28 are it, shifted right by 4; the lower 32 bits are 0.
__device__ inline uint32_t unpack_high(uint32_t word, const W4Step& s) {
  uint32_t sum;
  asm("mad.hi.u32 %0, %1, %2, %3;"
      : "=r"(sum)
      : "r"(word & 0xf0f0f0f0u), "r"(s.shifted), "r"(s.offset));
  return sum ^ 0x80808080u;
}

}  // namespace sqk
