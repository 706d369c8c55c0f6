// The activations of a streaming GEMM in shared memory, in the order in which mma.sync reads them.
// Each block copies or quantizes them for itself. Kernel ring: no torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/arithmetic.h"
#include "common/memory_order.cuh"
#include "common/reduce.cuh"
#include "common/rotate.cuh"
#include "common/scale.cuh"
#include "common/vector.cuh"
#include "gemm/stream/ring.cuh"

namespace sqk {

// Where element `at` of a token lies: chunk after chunk, and within a chunk token after token, so a
// warp reads a chunk of 8 tokens from 512 adjacent bytes. kW4: the weights have k in the order of
// mma.sync, so the 4x4 words of a chunk are transposed: a lane reads its four words at once.
template <bool kW4>
__device__ inline int resident_offset(int token, int at, int m) {
  const int chunk = (at / kChunk * m + token) * kChunk;
  return kW4 ? chunk + at / 4 % 4 * 16 + at / 16 % 4 * 4 + at % 4 : chunk + at % kChunk;
}

// Each thread commits one group of copies. kW4: transpose_rows must follow.
template <bool kW4, typename Params>
__device__ inline void copy_rows(const Params& p, uint8_t* to) {
  const int m = p.epilogue.m, pieces = p.stages * (kStageK<kW4> / kPiece);
  for (int i = threadIdx.x; i < m * pieces; i += blockDim.x) {
    const int token = i / pieces, at = (i - token * pieces) * kPiece;
    copy_piece(to + resident_offset<false>(token, at, m), p.x_row(token) + at, p.k - at);
  }
  commit_copies();
}

// Transposes the words of each chunk in place. Four lanes take one: they have copied it.
__device__ inline void transpose_rows(const StreamParams& p, uint8_t* to) {
  const int m = p.epilogue.m, pieces = p.stages * (kStageK<true> / kPiece), lane = threadIdx.x % 32;
  for (int first = threadIdx.x - lane; first < m * pieces; first += blockDim.x) {
    const int i = first + lane, token = i / pieces, at = (i - token * pieces) * kPiece;
    const bool inside = i < m * pieces;  // the same for the four lanes
    uint8_t* const chunk = to + resident_offset<false>(token, at / kChunk * kChunk, m);
    uint32_t word[4] = {};
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (inside) word[j] = *reinterpret_cast<const uint32_t*>(chunk + 16 * j + lane % 4 * 4);
    }
    __syncwarp();
    if (inside) {
      *reinterpret_cast<uint4*>(chunk + lane % 4 * 16) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

// Without copies, when the ring has been filled before: a wait for copies would wait for the ring's
// too. Nothing must follow.
template <bool kW4, typename Params>
__device__ inline void load_rows(const Params& p, uint8_t* to) {
  const int m = p.epilogue.m, pieces = p.stages * (kStageK<kW4> / kPiece);
#pragma unroll 4  // loads in flight
  for (int i = threadIdx.x; i < m * pieces; i += blockDim.x) {
    const int token = i / pieces, at = (i - token * pieces) * kPiece;
    const int8_t* const from = p.x_row(token) + at;
    int4 piece = make_int4(0, 0, 0, 0);
    if (at + kPiece <= p.k) {
      piece = load_fresh(reinterpret_cast<const int4*>(from));
    } else if (at < p.k) {
      int8_t bytes[kPiece] = {};
#pragma unroll
      for (int b = 0; b < kPiece; ++b) {
        if (at + b < p.k) bytes[b] = load_fresh(from + b);
      }
      std::memcpy(&piece, bytes, sizeof piece);
    }
    uint8_t* const place = to + resident_offset<kW4>(token, at, m);
    if constexpr (kW4) {
      const int word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) *reinterpret_cast<int*>(place + 16 * j) = word[j];
    } else {
      *reinterpret_cast<int4*>(place) = piece;
    }
  }
}

// Like Packed, for elements that are loaded one by one: each has its own register.
template <typename T>
struct Single {
  T element[kVec<T>];
};

// Quantizes rows of x with the same operations in the same order as the row kernels
// (quantize/row_kernel.cuh). One or several warps take a row. They go through its batches twice:
// forward for the maximum, backward to write, so the last batch, usually the only one, is read
// once. kWide: loads 16 bytes at a time; else one element, at any alignment.
template <typename T, bool kWide, bool kW4>
class RowQuantizer {
 public:
  __device__ RowQuantizer(const StreamParams& p, uint8_t* to, float* x_scale, uint32_t* maxima)
      : p_(p), to_(to), x_scale_(x_scale), maxima_(maxima) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, m = p.epilogue.m;
    parts_ = max(1, warps >> (32 - __clz(m - 1)));  // the same for every row
    at_once_ = warps / parts_;
    part_ = warp % parts_;
    row_ = warp / parts_;
    batches_ = divide_up(p.stages * kStageK<kW4>, kBatch * parts_);
    steps_ = divide_up(m, at_once_) * batches_;
  }

  // Calls `meanwhile` when the first batch has been requested.
  template <typename Meanwhile>
  __device__ void run(Meanwhile meanwhile) {
    AbsMax absmax;
#pragma unroll 1
    for (int i = 0; i < 2 * steps_ - 1; ++i) {
      const int step = min(i, 2 * (steps_ - 1) - i);
      const int row = row_ + step / batches_ * at_once_;
      const int first = (step % batches_ * parts_ + part_) * kBatch;
      fetch(row, first);
      if (i == 0) meanwhile();
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (warp_has(first, j)) finish(j);
      }
      if (p_.rotation != 0) rotate<kWide, kVectors, 1>(v_, p_.rotation);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (warp_has(first, j)) measure(j, absmax);
      }
      if (i < steps_) {
        if ((step + 1) % batches_ == 0) {
          const uint32_t bits = warp_max(absmax.bits());
          if (threadIdx.x % 32 == 0 && row < p_.epilogue.m) maxima_[row * parts_ + part_] = bits;
          absmax = AbsMax();
        }
      }
      if (i == steps_ - 1) __syncthreads();
      if (i >= steps_ - 1 && row < p_.epilogue.m) store(row, first, inverse(row));
    }
  }

 private:
  static constexpr int kV = kVec<T>;
  static constexpr int kVectors = 32 / kV;  // of a thread's batch: 32 elements
  static constexpr int kBatch = 32 * 32;    // elements of a warp's batch

  // The position in a batch of element e of a thread's vector i. If elements are loaded one by one,
  // adjacent lanes have adjacent elements.
  __device__ static int at(int i, int e) {
    const int lane = threadIdx.x % 32;
    return i * 32 * kV + (kWide ? lane * kV + e : e * 32 + lane);
  }

  // Whether vector i has data for any lane: short rows do not fill a batch.
  __device__ bool warp_has(int first, int i) const {
    return first + i * 32 * kV < p_.stages * kStageK<kW4>;
  }

  // Requests a batch. Elements after the end of the row are +0.
  __device__ void fetch(int row, int first) {
    const T* const x = static_cast<const T*>(p_.x) + row * p_.x_stride;
    const int end = row < p_.epilogue.m ? p_.k : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x_[i] = {};
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        v_[i][e] = 1.0f;
        if (!kWide && first + at(i, e) < end) x_[i].element[e] = x[first + at(i, e)];
      }
      if constexpr (kWide) {
        if (first + at(i, 0) < end) {
          x_[i].bits = load_streaming(x + first + at(i, 0));
        }
      }
    }
    if (p_.inv_smooth == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kWide) {
        if (first + at(i, 0) < end) load_floats(p_.inv_smooth + first + at(i, 0), v_[i]);
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          if (first + at(i, e) < end) v_[i][e] = __ldg(p_.inv_smooth + first + at(i, e));
        }
      }
    }
  }

  // Computes vector i before its rotation.
  __device__ void finish(int i) {
    // Keeps the compiler from unpacking x before `meanwhile`, where it would have to wait for x.
    if constexpr (kWide) {
      uint4& bits = x_[i].bits;
      asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    }
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      v_[i][e] = __fmul_rn(to_float(x_[i].element[e]), v_[i][e]);  // * 1 changes nothing
    }
  }

  // The second pass does not use this maximum.
  __device__ void measure(int i, AbsMax& absmax) const {
#pragma unroll
    for (int e = 0; e < kV; ++e) absmax.add(v_[i][e]);
  }

  // The factor for a row; its scale is stored for the epilogue.
  __device__ float inverse(int row) const {
    const int lane = threadIdx.x % 32;
    const bool per_tensor = p_.scheme == Scheme::kPerTensor;
    const int first = per_tensor ? 0 : row * parts_;
    const int count = per_tensor ? p_.epilogue.m * parts_ : parts_;
    const uint32_t bits = warp_max(lane < count ? maxima_[first + lane] : 0u);
    float scale = scale_of(bits);
    float inverse = inverse_of(scale);
    if (p_.scheme == Scheme::kStatic) {
      const float given = __ldg(p_.scale);
      inverse = inverse_of(given);
      scale = static_scale_of(bits, given);
    }
    if (part_ == 0 && lane == 0) x_scale_[row] = scale;
    return inverse;
  }

  // Also writes 0 after the end of the row, up to the end of its last stage.
  __device__ void store(int row, int first, float inverse) const {
    const int m = p_.epilogue.m, end = p_.stages * kStageK<kW4>;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!warp_has(first, i)) continue;
      if constexpr (!kWide) {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          if (first + at(i, e) >= end) continue;
          to_[resident_offset<kW4>(row, first + at(i, e), m)] =
              to_int8(__fmul_rn(v_[i][e], inverse));
        }
        continue;
      }
      if (first + at(i, 0) >= end) continue;
      const Int8Vector<kV> packed = to_int8_vector(v_[i], inverse);
      uint8_t* const place = to_ + resident_offset<kW4>(row, first + at(i, 0), m);
      if constexpr (kW4 && kV == 8) {  // words of different lanes
        *reinterpret_cast<uint32_t*>(place) = packed.x;
        *reinterpret_cast<uint32_t*>(place + 16) = packed.y;
      } else {
        *reinterpret_cast<Int8Vector<kV>*>(place) = packed;
      }
    }
  }

  const StreamParams& p_;
  uint8_t* to_;
  float* x_scale_;
  uint32_t* maxima_;  // [row][part]
  int parts_;         // warps that share a row
  int at_once_;       // rows in progress at a time
  int part_, row_;    // of this warp; its rows are row_, row_ + at_once_, ...
  int batches_;       // of a row for each of its warps
  int steps_;         // batches of all of a warp's rows
  std::conditional_t<kWide, Packed<T>, Single<T>> x_[kVectors];
  float v_[kVectors][kV];  // inv_smooth, then x * inv_smooth, then rotated
};

}  // namespace sqk
