// The kernel of all producers: a team of threads takes a row (or a slice of one), keeps it, and
// writes it as int8. Kernel ring: no torch.
//
// The row is read from global memory once. A thread keeps its vectors in registers, what does not
// fit there in shared memory (kLong, kElement), and only what fits in neither is read again.
#pragma once

#include "quantize/row_slice.cuh"
#include "sqk/quantize.h"

namespace sqk {

enum class Pass : int32_t {
  kWhole,    // measure and write: one launch
  kMeasure,  // the first of two: maxima to the workspace
  kApply,    // the second: from the maxima to int8
};

struct RowParams {
  QuantizeParams q;
  Pass pass;
  int32_t splits;        // slices per row
  int32_t slice;         // elements per slice, a multiple of the vector
  int32_t slots;         // vectors per thread in shared memory
  int64_t maxima_count;  // kApply: how many maxima make one scale
  uint32_t* maxima;      // bits of |v|; [teams] per tensor, [m, splits] per token
};

template <typename T, Producer kProducer, QuantizePath kPath>
__global__ void __launch_bounds__(max_threads(kPath), 1)
    row_kernel(const __grid_constant__ RowParams p) {
  using Traits = PathTraits<kPath>;
  using Slice = RowSlice<T, kProducer, kPath>;
  constexpr int kV = kVec<T>;
  const QuantizeParams& q = p.q;
  Team<Traits::kGroup> team;
  const int rank = team.rank(), size = team.size();
  const auto nothing = [](int, float(&)[kV]) {};

  const auto largest_of = [&](const uint32_t* maxima) {
    uint32_t largest = 0;
    for (int64_t i = rank; i < p.maxima_count; i += size) {
      largest = maxima[i] > largest ? maxima[i] : largest;
    }
    return team.max(largest);
  };
  const bool per_tensor = q.scheme == Scheme::kPerTensor;
  uint32_t tensor_absmax = 0;
  if (p.pass == Pass::kApply && per_tensor) {
    tensor_absmax = largest_of(p.maxima);
    if (team.team() == 0 && rank == 0) q.x_scale[0] = scale_of(tensor_absmax);
  }

  for (int64_t piece = team.team(); piece < q.m * p.splits; piece += team.teams()) {
    const int64_t row = p.splits == 1 ? piece : piece / p.splits;
    const int from = static_cast<int>(piece - row * p.splits) * p.slice;
    const T* other = nullptr;
    if constexpr (Slice::kAct) {
      if (q.gate != nullptr) other = static_cast<const T*>(q.gate) + row * q.gate_stride;
    }
    if constexpr (Slice::kNorm) {
      if (q.residual != nullptr) {
        other = static_cast<const T*>(q.residual) + row * q.residual_stride;
      }
    }
    Slice s{q,
            static_cast<const T*>(q.x) + row * q.x_stride,
            other,
            Slice::kNorm ? static_cast<T*>(q.sum) + row * q.sum_stride : nullptr,
            q.x_q + row * q.x_q_stride,
            min(static_cast<int>(q.k), from + p.slice),
            size * kV,
            from + (Traits::kVectors ? rank * kV : rank / 32 * 32 * kV + rank % 32),
            {}};
    Keep<T, kProducer, kPath> keep;
    uint32_t absmax = 0;
    const auto measure = [&](int i, float(&v)[kV]) { absmax = max(absmax, s.absmax(i, v)); };

    if constexpr (Slice::kNorm) {
      float partial = 0.0f;
      const auto add_squares = [&](int i, float(&v)[kV]) {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          const float d = __fsub_rn(v[e], s.moments.mean);
          const bool inside = Traits::kVectors ? s.has(i) : s.has(i, e);
          partial = inside ? __fmaf_rn(d, d, partial) : partial;
        }
      };
      if constexpr (kProducer == Producer::kLayerNorm) {
        keep.read(s, p.slots, [&](int, float(&v)[kV]) {
#pragma unroll
          for (int e = 0; e < kV; ++e) partial = __fadd_rn(partial, v[e]);
        });
        s.moments.mean = __fdiv_rn(team.sum(partial), static_cast<float>(q.k));
        partial = 0.0f;
        keep.template visit<false>(s, p.slots, add_squares, nothing);
      } else {
        keep.read(s, p.slots, add_squares);
      }
      s.moments.rstd = inverse_deviation(team.sum(partial), static_cast<int>(q.k), q.eps);
      keep.template visit<true>(
          s, p.slots,
          [&](int i, float(&v)[kV]) {
            s.finish(i, v);
            measure(i, v);
          },
          nothing);
    } else {
      keep.read(s, p.slots, measure);
    }

    float inverse;
    if (p.pass == Pass::kApply && per_tensor) {
      inverse = inverse_of(scale_of(tensor_absmax));
    } else {
      absmax = p.pass == Pass::kApply ? largest_of(p.maxima + row * p.splits) : team.max(absmax);
      if (p.pass == Pass::kMeasure) {
        if (!per_tensor) {
          if (rank == 0) p.maxima[piece] = absmax;
        } else {
          tensor_absmax = max(tensor_absmax, absmax);
        }
        continue;
      }
      float scale = scale_of(absmax);
      inverse = inverse_of(scale);
      if (q.scheme == Scheme::kStatic) {
        const float given = *q.scale;
        inverse = inverse_of(given);
        scale = is_finite_bits(absmax) ? given : __uint_as_float(0x7fffffffu);
      }
      if (rank == 0 && from == 0) q.x_scale[row] = scale;
    }
    keep.template visit<false>(
        s, p.slots, [&](int i, float(&v)[kV]) { s.store(i, v, inverse); },
        [&](int i, float(&v)[kV]) { s.finish(i, v); });
    if (s.end == q.k) {
      for (int64_t k = q.k + rank; k < q.k_padded; k += size) s.out[k] = 0;
    }
  }
  if (p.pass == Pass::kMeasure && per_tensor && rank == 0) p.maxima[team.team()] = tensor_absmax;
}

}  // namespace sqk
