// Weights of 4 bits to int8, in registers. Kernel ring: no torch.
#pragma once

#include <cstdint>

namespace sqk {

// What the integer multiply-adds of `unpack_w4` take of a channel's group.
struct W4Scale {
  uint64_t addend;     // offset + 128 in each of the four upper bytes, and the step
  uint32_t high_step;  // the step in the highest 4 bits

  // From a step in byte kPlace of a word and an offset + 128 in the byte above it.
  template <int kPlace>
  __device__ static W4Scale of(uint32_t word) {
    const uint32_t step = __byte_perm(word, 0, 0x4440 + kPlace);
    const uint32_t offsets = __byte_perm(word, 0, 0x1111 * (kPlace + 1));
    uint64_t addend;
    // With a shift and an OR, ptxas adds the upper half of `step`, which is 0, to every product.
    asm("mov.b64 %0, {%1, %2};" : "=l"(addend) : "r"(step), "r"(offsets));
    return {addend, step << 28};
  }
};

// Eight weights: `low` has those of the low halves of the bytes of `word`, `high` the others.
//
// value * step + offset + 128 is in [0, 255], so one multiply-add computes four of them: nothing
// carries into the next byte. Less 128 is a change of the highest bit. The high halves are 16 times
// as large; times step << 28, the upper word of the product is what it should be, and the lower one
// is 0. So four weights take three instructions, LOP3, IMAD, LOP3, which the gates count. The
// multiply-add for an upper word takes two registers as its addend; the lower one could be
// anything, and being the step saves a register and a move.
__device__ inline void unpack_w4(uint32_t word, const W4Scale& scale, uint32_t& low,
                                 uint32_t& high) {
  constexpr uint32_t kLow = 0x0f0f0f0f, kSigns = 0x80808080;
  const auto step = static_cast<uint32_t>(scale.addend);
  const auto offsets = static_cast<uint32_t>(scale.addend >> 32);
  low = ((word & kLow) * step + offsets) ^ kSigns;
  const uint64_t wide = uint64_t{word & ~kLow} * scale.high_step + scale.addend;
  high = static_cast<uint32_t>(wide >> 32) ^ kSigns;
}

}  // namespace sqk
