// One thread's view of a row: where its elements lie, how they are computed and where they are
// kept. Kernel ring: no torch.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "quantize/producer.cuh"
#include "quantize/table.h"
#include "sqk/quantize.h"

namespace sqk {

template <QuantizePath kPath>
struct PathTraits {
  static constexpr bool kVectors = kPath != QuantizePath::kElement;
  static constexpr bool kOverflows =
      kPath == QuantizePath::kLong || kPath == QuantizePath::kElement;
  static constexpr Group kGroup = kPath == QuantizePath::kWarp      ? Group::kWarp
                                  : kPath == QuantizePath::kCluster ? Group::kCluster
                                                                    : Group::kBlock;
};

// One thread's part of a row or slice: where its elements lie and how they are computed.
template <typename T, Producer kProducer, QuantizePath kPath>
struct RowSlice {
  using Traits = PathTraits<kPath>;
  static constexpr int kV = kVec<T>;
  static constexpr bool kNorm = is_norm(kProducer);
  static constexpr bool kAct = is_activation(kProducer);

  const QuantizeParams& q;
  const T* x;
  const T* other;  // gate or residual, or null
  T* sum;
  int8_t* out;
  int end;     // after the last element
  int stride;  // elements between a thread's vectors
  int first;   // element 0 of its vector 0
  Moments moments;

  // The position of element e of a thread's vector i. A thread of a vector path has adjacent
  // elements. In kElement adjacent lanes have them, so that narrow accesses fill whole sectors too.
  __device__ int at(int i, int e) const {
    return first + i * stride + (Traits::kVectors ? e : e * 32);
  }
  __device__ bool has(int i, int e) const { return at(i, e) < end; }
  // Vector paths get only whole vectors (plan_quantize), so checking the first element is enough.
  __device__ bool has(int i) const { return at(i, 0) < end; }

  __device__ void fetch(const T* row, int i, Packed<T>& to) const {
    if constexpr (Traits::kVectors) {
      if (has(i)) to.bits = load_streaming(row + at(i, 0));
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if (has(i, e)) to.element[e] = row[at(i, e)];
      }
    }
  }

  // The input in float32, after the residual or the activation; +0 outside of the row.
  __device__ void begin(int i, const Packed<T>& a, const Packed<T>& b, float (&v)[kV]) const {
    if constexpr (kAct) {
      // One branch for all elements, so that their chains of instructions can overlap.
      if (other != nullptr) {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          v[e] = __fmul_rn(activate<kProducer>(to_float(b.element[e])), to_float(a.element[e]));
        }
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e) v[e] = activate<kProducer>(to_float(a.element[e]));
      }
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) v[e] = to_float(a.element[e]);
    }
    if constexpr (kNorm) {
      if (other == nullptr) return;
      Packed<T> total;
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        total.element[e] = from_float<T>(__fadd_rn(v[e], to_float(b.element[e])));
        v[e] = to_float(total.element[e]);
      }
      store_sum(i, total);
    }
  }

  __device__ void store_sum(int i, const Packed<T>& total) const {
    if constexpr (Traits::kVectors) {
      if (has(i)) *reinterpret_cast<uint4*>(sum + at(i, 0)) = total.bits;
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if (has(i, e)) sum[at(i, e)] = total.element[e];
      }
    }
  }

  // Reads a vector again that was not kept. With a residual it reads `sum`, which has x + residual
  // and may have overwritten x.
  __device__ void again(int i, float (&v)[kV]) const {
    Packed<T> a, b;
    if (kNorm && other != nullptr) {
      if constexpr (Traits::kVectors) {
        if (has(i)) a.bits = *reinterpret_cast<const uint4*>(sum + at(i, 0));
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          if (has(i, e)) a.element[e] = sum[at(i, e)];
        }
      }
#pragma unroll
      for (int e = 0; e < kV; ++e) v[e] = to_float(a.element[e]);
      return;
    }
    fetch(x, i, a);
    if (other != nullptr) fetch(other, i, b);
    begin(i, a, b, v);
  }

  __device__ void read_parameters(const void* base, DType dtype, int i, float (&p)[kV]) const {
    if constexpr (Traits::kVectors) {
      if (has(i)) load_parameters(base, dtype, at(i, 0), p);
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if (has(i, e)) p[e] = load_parameter(base, dtype, at(i, e));
      }
    }
  }

  // The norm, then the smoothing (inv_smooth).
  __device__ void finish(int i, float (&v)[kV]) const {
    float p[kV] = {};
    if constexpr (kNorm) {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if constexpr (kProducer == Producer::kLayerNorm) v[e] = __fsub_rn(v[e], moments.mean);
        v[e] = __fmul_rn(v[e], moments.rstd);
      }
      if (q.weight != nullptr) {
        read_parameters(q.weight, q.weight_dtype, i, p);
#pragma unroll
        for (int e = 0; e < kV; ++e) v[e] = __fmul_rn(v[e], p[e]);
      }
      if constexpr (kProducer == Producer::kLayerNorm) {
        if (q.bias != nullptr) {
          read_parameters(q.bias, q.bias_dtype, i, p);
#pragma unroll
          for (int e = 0; e < kV; ++e) v[e] = __fadd_rn(v[e], p[e]);
        }
      }
    }
    if (q.inv_smooth != nullptr) {
      read_parameters(q.inv_smooth, DType::kFloat32, i, p);
#pragma unroll
      for (int e = 0; e < kV; ++e) v[e] = __fmul_rn(v[e], p[e]);
    }
  }

  // v is arbitrary outside of the row.
  __device__ void measure(int i, const float (&v)[kV], AbsMax& largest) const {
    if constexpr (Traits::kVectors) {
      if (!has(i)) return;
    }
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if (Traits::kVectors || has(i, e)) largest.add(v[e]);
    }
  }

  __device__ float add_squares(int i, const float (&v)[kV], float sum) const {
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if constexpr (kProducer == Producer::kLayerNorm) {
        const float d = __fsub_rn(v[e], moments.mean);
        const bool inside = Traits::kVectors ? has(i) : has(i, e);
        sum = inside ? __fmaf_rn(d, d, sum) : sum;
      } else {
        sum = __fmaf_rn(v[e], v[e], sum);  // v is +0 outside of the row
      }
    }
    return sum;
  }

  __device__ void store(int i, const float (&v)[kV], float inverse) const {
    if constexpr (Traits::kVectors) {
      if (!has(i)) return;
      const Int8Vector<kV> packed = to_int8_vector(v, inverse);
      *reinterpret_cast<Int8Vector<kV>*>(out + at(i, 0)) = packed;
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if (has(i, e)) out[at(i, e)] = to_int8(__fmul_rn(v[e], inverse));
      }
    }
  }
};

// Keeps the vectors of a thread, and passes through them.
template <typename T, Producer kProducer, QuantizePath kPath>
struct Keep {
  using Traits = PathTraits<kPath>;
  using Slice = RowSlice<T, kProducer, kPath>;
  static constexpr int kV = kVec<T>;
  static constexpr int kRegisters = floats_per_thread(kPath, sizeof(T)) / kV;
  // With a second input, this many vectors of each are in flight: more would not fit in registers.
  static constexpr int kBatch = kProducer == Producer::kQuantize || kRegisters < 4 ? kRegisters
                                : kRegisters % 4 == 0                              ? 4
                                                                                   : 3;
  static_assert(kRegisters % kBatch == 0);

  float v[kRegisters][kV];

  // This thread's shared memory: 16 bytes of each thread side by side, without bank conflicts.
  __device__ static float4* shared(int slot, int part) {
    extern __shared__ float4 storage[];
    return storage + (slot * (kV / 4) + part) * blockDim.x + threadIdx.x;
  }
  __device__ static void put(int slot, const float (&from)[kV]) {
#pragma unroll
    for (int e = 0; e < kV; e += 4) {
      *shared(slot, e / 4) = make_float4(from[e], from[e + 1], from[e + 2], from[e + 3]);
    }
  }
  __device__ static void get(int slot, float (&to)[kV]) {
#pragma unroll
    for (int e = 0; e < kV; e += 4) {
      const float4 f = *shared(slot, e / 4);
      to[e] = f.x, to[e + 1] = f.y, to[e + 2] = f.z, to[e + 3] = f.w;
    }
  }

  // Reads the row and passes every vector to `see`. Norms keep the input, the others the result.
  template <typename See>
  __device__ void read(const Slice& s, int slots, See see) {
#pragma unroll
    for (int base = 0; base < kRegisters; base += kBatch) {
      Packed<T> a[kBatch], b[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) s.fetch(s.x, base + i, a[i]);
      if (kProducer != Producer::kQuantize && s.other != nullptr) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) s.fetch(s.other, base + i, b[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        s.begin(base + i, a[i], b[i], v[base + i]);
        if constexpr (!Slice::kNorm) s.finish(base + i, v[base + i]);
        see(base + i, v[base + i]);
      }
    }
    if constexpr (Traits::kOverflows) {
#pragma unroll 1
      for (int i = kRegisters; s.has(i); ++i) {
        Packed<T> a, b;
        float w[kV];
        s.fetch(s.x, i, a);
        if (kProducer != Producer::kQuantize && s.other != nullptr) s.fetch(s.other, i, b);
        s.begin(i, a, b, w);
        if constexpr (!Slice::kNorm) s.finish(i, w);
        see(i, w);
        if (i - kRegisters < slots) put(i - kRegisters, w);
      }
    }
  }

  // Passes every vector to `look` once more. For a vector that was not kept, `redo` first repeats
  // what happened to the others since `read`. kWrite: `look` changes the vectors, and the changes
  // are kept.
  template <bool kWrite, typename Look, typename Redo>
  __device__ void visit(const Slice& s, int slots, Look look, Redo redo) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) look(i, v[i]);
    if constexpr (Traits::kOverflows) {
#pragma unroll 1
      for (int i = kRegisters; s.has(i); ++i) {
        float w[kV];
        if (i - kRegisters < slots) {
          get(i - kRegisters, w);
          look(i, w);
          if constexpr (kWrite) put(i - kRegisters, w);
        } else {
          s.again(i, w);
          redo(i, w);
          look(i, w);
        }
      }
    }
  }
};

}  // namespace sqk
