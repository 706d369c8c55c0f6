// Arithmetic on f16 and bf16, single and packed.
#pragma once
#include "instructions/handlers.h"

namespace ptxsim {
// half precision: KIND 0 f16, 1 bf16; packed forms work on both halves
template <int K>
inline float half_to_float(u16 h) {
  return K == 0 ? half_bits_to_float(h) : bf16_to_float(h);
}
template <int K>
inline u16 half_from_double(double d) {
  return d != d ? 0x7fff : (u16)to_small(d, K == 0 ? kSmallF16 : kSmallBf16);
}
template <int K>
inline u16 half_from_float(float f) {
  return K == 0 ? float_to_half_bits(f) : float_to_bf16(f);
}
template <int K>
inline u16 half_ftz(u16 h) {
  return (h & (K == 0 ? 0x7c00 : 0x7f80)) ? h : (u16)(h & 0x8000);
}
enum {
  kHalfAdd,
  kHalfSub,
  kHalfMul,
  kHalfFma,
  kHalfNeg,
  kHalfAbs,
  kHalfMin,
  kHalfMax,
  kHalfEx2,
  kHalfTanh
};
void lower_half(Lowering& lowering, const Statement& statement, Type type, int op, int sources);
}  // namespace ptxsim
