// The kernel of all producers. A team of threads takes a row, or a slice of one, and writes it as
// int8. Kernel ring: no torch.
//
// Each launch reads an element from global memory once: a thread keeps its vectors in registers
// and, in kLong and kElement, more of them in shared memory. Only what fits in neither is read
// again.
#pragma once

#include "common/memory_order.cuh"
#include "quantize/row_slice.cuh"
#include "sqk/quantize.h"

namespace sqk {

enum class Pass : int32_t {
  kWhole,    // measure and write: one launch
  kMeasure,  // the first of two: maxima to the workspace
  kApply,    // the second: from the maxima to int8
};

// Compiled separately: the code that only two launches need would cost registers and instructions.
// kTwo also does the work of one launch (Pass::kWhole).
enum class Launches { kOne, kTwo };

struct RowParams {
  QuantizeParams q;
  Pass pass;
  int32_t splits;        // slices per row; 1 in one launch
  int32_t slice;         // elements per slice, a multiple of the vector
  int32_t slots;         // vectors per thread in shared memory
  int64_t maxima_count;  // kApply: how many maxima make one scale
  uint32_t* maxima;      // bits of |v|; [blocks] per tensor, [m, splits] per token
};

// The largest of the maxima, for all threads of the block.
__device__ inline uint32_t largest_of(const uint32_t* maxima, int64_t count,
                                      Team<Group::kBlock>& block) {
  uint32_t largest = 0;
#pragma unroll 4  // loads in flight
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) largest = max(largest, maxima[i]);
  return block.max(largest);
}

// All threads of a block as a team. If `team` is the block already, this must be the same object:
// two would not know of each other's turns in the shared buffers.
template <Group kGroup>
__device__ Team<Group::kBlock>& whole_block(Team<kGroup>& team, Team<Group::kBlock>& of_warps) {
  if constexpr (kGroup == Group::kBlock) {
    return team;
  } else {
    return of_warps;
  }
}

// Calls `see` for each of a thread's vectors; `first` is the number of v[0].
template <int kCount, int kV, typename See>
__device__ void each(int first, float (&v)[kCount][kV], See see) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) see(first + i, v[i]);
}

template <typename T, Producer kProducer, QuantizePath kPath, Launches kLaunches>
constexpr int kMaxThreads =
    max_threads({kPath, sizeof(T), is_norm(kProducer), kLaunches == Launches::kTwo});

// Without the 1 (blocks per SM), ptxas aims for more blocks and spills.
template <typename T, Producer kProducer, QuantizePath kPath, Launches kLaunches, bool kRotates>
__global__ void __launch_bounds__(kMaxThreads<T, kProducer, kPath, kLaunches>, 1)
    row_kernel(const __grid_constant__ RowParams p) {
  using Traits = PathTraits<kPath>;
  using Slice = RowSlice<T, kProducer, kPath, kRotates>;
  constexpr int kV = kVec<T>;
  constexpr bool kTwo = kLaunches == Launches::kTwo;
  const QuantizeParams& q = p.q;
  Team<Traits::kGroup> team;
  const int rank = team.rank(), size = team.size();
  const auto nothing = [](int, auto&) {};
  const bool measures = kTwo && p.pass == Pass::kMeasure;
  const bool applies = kTwo && p.pass == Pass::kApply;
  const bool per_tensor = kTwo && q.scheme == Scheme::kPerTensor;

  Team<Group::kBlock> of_warps;
  Team<Group::kBlock>& block = whole_block(team, of_warps);  // for kTwo
  // Before anything else: x and residual come from the kernel before this one, and x_q, sum and the
  // maxima may lie where that kernel still reads.
  wait_for_previous_kernel();
  allow_next_kernel();
  uint32_t tensor_absmax = 0;  // the maximum of this team, then of all
  if constexpr (kTwo) {
    if (applies && per_tensor) {
      tensor_absmax = largest_of(p.maxima, p.maxima_count, block);
      if (blockIdx.x == 0 && threadIdx.x == 0) q.x_scale[0] = scale_of(tensor_absmax);
    }
  }

  const auto take = [&](int64_t piece) {
    const int64_t row = !kTwo || p.splits == 1 ? piece : piece / p.splits;
    const int from = kTwo ? static_cast<int>(piece - row * p.splits) * p.slice : 0;
    const T* other = nullptr;
    if constexpr (Slice::kAct) {
      if (q.gate != nullptr) other = static_cast<const T*>(q.gate) + row * q.gate_stride;
    }
    if constexpr (Slice::kNorm) {
      if (q.residual != nullptr) {
        other = static_cast<const T*>(q.residual) + row * q.residual_stride;
      }
    }
    const int k = static_cast<int>(q.k);
    // Of a row whose first 32 * kV * kSpan elements are the first warp's, else 32 * kV.
    const bool together = Slice::kSpan > 1 && q.rotation > 32 * kV;
    const int warp_first = rank / 32 * 32 * kV;
    const int own = Traits::kVectors ? rank * kV : warp_first + rank % 32;
    Slice s{q,
            static_cast<const T*>(q.x) + row * q.x_stride,
            other,
            Slice::kNorm ? static_cast<T*>(q.sum) + row * q.sum_stride : nullptr,
            q.x_q + row * q.x_q_stride,
            kTwo ? min(k, from + p.slice) : k,
            size * kV,
            together ? 32 * kV : size * kV,
            from + own + (together ? warp_first * (Slice::kSpan - 1) : 0),
            {}};
    Keep<T, kProducer, kPath, kRotates> keep;
    AbsMax absmax;
    const auto measure = [&](int first, auto& v) {
      s.rotate(v);
      each(first, v, [&](int i, float (&of)[kV]) { s.measure(i, of, absmax); });
    };
    const auto finish = [&](int first, auto& v) {
      each(first, v, [&](int i, float (&of)[kV]) { s.finish(i, of); });
    };

    if constexpr (Slice::kNorm) {
      float partial = 0.0f;
      const auto add_squares = [&](int first, auto& v) {
        each(first, v, [&](int i, float (&of)[kV]) { partial = s.add_squares(i, of, partial); });
      };
      if constexpr (kProducer == Producer::kLayerNorm) {
        keep.read(s, p.slots, [&](int first, auto& v) {
          each(first, v, [&](int, float (&of)[kV]) {
#pragma unroll
            for (int e = 0; e < kV; ++e) partial = __fadd_rn(partial, of[e]);
          });
        });
        s.moments.mean = __fdiv_rn(team.sum(partial), static_cast<float>(k));
        partial = 0.0f;
        keep.template visit<false>(s, p.slots, add_squares, nothing);
      } else {
        keep.read(s, p.slots, add_squares);
      }
      s.moments.rstd = inverse_deviation(team.sum(partial), k, static_cast<float>(q.eps));
      keep.template visit<true>(
          s, p.slots,
          [&](int first, auto& v) {
            finish(first, v);
            measure(first, v);
          },
          nothing);
    } else {
      keep.read(s, p.slots, measure);
    }

    float inverse;
    if (applies && per_tensor) {
      inverse = inverse_of(scale_of(tensor_absmax));
    } else {
      uint32_t bits = absmax.bits();
      if (measures && per_tensor) {
        tensor_absmax = max(tensor_absmax, bits);
        return;
      }
      bits = team.max(bits);
      if (measures) {
        if (rank == 0) p.maxima[piece] = bits;
        return;
      }
      if (applies) bits = largest_of(p.maxima + row * p.splits, p.maxima_count, block);
      float scale = scale_of(bits);
      inverse = inverse_of(scale);
      if (q.scheme == Scheme::kStatic) {
        const float given = *q.scale;
        inverse = inverse_of(given);
        scale = static_scale_of(bits, given);
      }
      if (rank == 0 && from == 0) q.x_scale[row] = scale;
    }
    keep.template visit<false>(
        s, p.slots,
        [&](int first, auto& v) {
          each(first, v, [&](int i, float (&of)[kV]) { s.store(i, of, inverse); });
        },
        [&](int first, auto& v) {
          finish(first, v);
          s.rotate(v);
        });
    if (s.end == k) {
#pragma unroll 1  // rarely any; an unrolled loop would start with a division
      for (int64_t c = q.k + rank; c < q.k_padded; c += size) s.out[c] = 0;
    }
  };

  if constexpr (kTwo) {
    for (int64_t piece = team.team(); piece < q.m * p.splits; piece += team.teams()) take(piece);
    if (measures && per_tensor) {
      tensor_absmax = block.max(tensor_absmax);
      if (threadIdx.x == 0) p.maxima[blockIdx.x] = tensor_absmax;
    }
  } else if (team.team() < q.m) {
    take(team.team());
  }
}

}  // namespace sqk
