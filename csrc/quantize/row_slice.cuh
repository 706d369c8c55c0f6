// One thread's view of a row: where its elements lie, how they are computed and where they are
// kept. Kernel ring: no torch.
#pragma once

#include "common/reduce.cuh"
#include "common/rotate.cuh"
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
// kRotates: false if it is known at compile time that there is no rotation.
template <typename T, Producer kProducer, QuantizePath kPath, bool kRotates>
struct RowSlice {
  using Traits = PathTraits<kPath>;
  static constexpr int kV = kVec<T>;
  static constexpr bool kNorm = is_norm(kProducer);
  static constexpr bool kAct = is_activation(kProducer);
  static constexpr int kSpan = vectors_together(kPath, sizeof(T), kRotates);

  const QuantizeParams& q;
  const T* x;
  const T* other;  // gate or residual, or null
  T* sum;
  int8_t* out;
  int end;     // after the last element
  int stride;  // elements between a thread's vectors
  int near;    // as stride, but less within each kSpan vectors if a rotation mixes these
  int first;   // element 0 of its vector 0
  Moments moments;

  // The position of element e of a thread's vector i. A thread of a vector path has adjacent
  // elements. In kElement adjacent lanes have them, so that narrow accesses fill whole sectors too.
  __device__ int at(int i, int e) const {
    const int vector = i % kSpan * near + i / kSpan * kSpan * stride;
    return first + vector + (Traits::kVectors ? e : e * 32);
  }
  __device__ bool has(int i, int e) const { return at(i, e) < end; }
  // Vector paths get only whole vectors (plan_quantize), so checking the first element is enough.
  __device__ bool has(int i) const { return at(i, 0) < end; }
  // Whether any lane of the warp has a vector i.
  __device__ bool warp_has(int i) const {
    return at(i, 0) - static_cast<int>(threadIdx.x % 32) * (Traits::kVectors ? kV : 1) < end;
  }

  // Where a channel lies in its row. Interleaved, a block of gate comes before its block of up.
  __device__ int source(int channel, bool gate) const {
    if constexpr (kAct) {
      constexpr int kBlock = static_cast<int>(kGateBlock);
      if (q.interleaved) {
        const int block = channel / kBlock * kBlock;
        const int rows = min(kBlock, static_cast<int>(q.k) - block);
        return channel + block + (gate ? 0 : rows);
      }
    }
    return channel;
  }

  __device__ void fetch(const T* row, int i, Packed<T>& to, bool gate = false) const {
    if constexpr (Traits::kVectors) {
      if (has(i)) to.bits = load_streaming(row + source(at(i, 0), gate));
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        if (has(i, e)) to.element[e] = row[source(at(i, e), gate)];
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
    if (other != nullptr) fetch(other, i, b, true);
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

  // The rotation. All lanes must call it. No element is mixed with one outside of the row.
  template <int kCount>
  __device__ void rotate(float (&v)[kCount][kV]) const {
    // These two paths are for a few rows.
    constexpr bool kShort = kPath == QuantizePath::kBlock || kPath == QuantizePath::kCluster;
    if (kRotates && q.rotation != 0) {
      sqk::rotate<Traits::kVectors, kSpan, kShort ? 5 : 1>(v, q.rotation);
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
template <typename T, Producer kProducer, QuantizePath kPath, bool kRotates>
struct Keep {
  using Traits = PathTraits<kPath>;
  using Slice = RowSlice<T, kProducer, kPath, kRotates>;
  static constexpr int kV = kVec<T>;
  static constexpr int kRegisters = floats_per_thread(kPath, sizeof(T), kRotates) / kV;
  // With a second input, this many vectors of each are in flight: more would not fit in registers.
  static constexpr int kBatch = kRegisters == 0                                      ? 1
                                : kProducer == Producer::kQuantize || kRegisters < 4 ? kRegisters
                                : kRegisters % 4 == 0                                ? 4
                                                                                     : 3;
  static constexpr int kSpan = Slice::kSpan;
  static_assert(kRegisters % kBatch == 0 && kRegisters % kSpan == 0);

  float v[kRegisters == 0 ? 1 : kRegisters][kV];

  // This thread's shared memory: 16 bytes of each thread side by side, without bank conflicts.
  __device__ static float4* shared(int slot, int part) {
    extern __shared__ float4 storage[];
    return storage + (slot * (kV / 4) + part) * blockDim.x + threadIdx.x;
  }
  __device__ static void put(int slot, const float (&from)[kSpan][kV]) {
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
      for (int e = 0; e < kV; e += 4) {
        const float (&f)[kV] = from[j];
        *shared(slot + j, e / 4) = make_float4(f[e], f[e + 1], f[e + 2], f[e + 3]);
      }
    }
  }
  __device__ static void get(int slot, float (&to)[kSpan][kV]) {
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
      for (int e = 0; e < kV; e += 4) {
        const float4 f = *shared(slot + j, e / 4);
        to[j][e] = f.x, to[j][e + 1] = f.y, to[j][e + 2] = f.z, to[j][e + 3] = f.w;
      }
    }
  }

  // Reads the row and passes all vectors in registers to `see`, then kSpan at a time. Norms keep
  // the input, the others the result.
  template <typename See>
  __device__ void read(const Slice& s, int slots, See see) {
#pragma unroll
    for (int base = 0; base < kRegisters; base += kBatch) {
      Packed<T> a[kBatch], b[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) s.fetch(s.x, base + i, a[i]);
      if (kProducer != Producer::kQuantize && s.other != nullptr) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) s.fetch(s.other, base + i, b[i], true);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        s.begin(base + i, a[i], b[i], v[base + i]);
        if constexpr (!Slice::kNorm) s.finish(base + i, v[base + i]);
      }
    }
    if constexpr (kRegisters > 0) see(0, v);
    each_overflow(s, [&](int first) {
      float w[kSpan][kV];
      each_vector(s, first, w, [&](int i, float (&to)[kV]) {
        Packed<T> a, b;
        s.fetch(s.x, i, a);
        if (kProducer != Producer::kQuantize && s.other != nullptr) s.fetch(s.other, i, b, true);
        s.begin(i, a, b, to);
        if constexpr (!Slice::kNorm) s.finish(i, to);
      });
      see(first, w);
      if (first - kRegisters < slots) put(first - kRegisters, w);
    });
  }

  // Passes all vectors to `look` once more, as `read` does. For vectors that were not kept, `redo`
  // first repeats what happened to the others since `read`. kWrite: `look` changes the vectors, and
  // the changes are kept.
  template <bool kWrite, typename Look, typename Redo>
  __device__ void visit(const Slice& s, int slots, Look look, Redo redo) {
    if constexpr (kRegisters > 0) look(0, v);
    each_overflow(s, [&](int first) {
      float w[kSpan][kV];
      if (first - kRegisters < slots) {
        get(first - kRegisters, w);
        look(first, w);
        if constexpr (kWrite) put(first - kRegisters, w);
      } else {
        each_vector(s, first, w, [&](int i, float (&to)[kV]) { s.again(i, to); });
        redo(first, w);
        look(first, w);
      }
    });
  }

 private:
  // Calls `visit` with the first of each kSpan vectors that are not in registers. All lanes of a
  // warp make the same calls, because a rotation exchanges values between them.
  template <typename Visit>
  __device__ static void each_overflow(const Slice& s, Visit visit) {
    if constexpr (Traits::kOverflows) {
#pragma unroll 1
      for (int i = kRegisters; s.warp_has(i); i += kSpan) visit(i);
    }
  }

  // Calls `fill` for those of kSpan vectors that any lane has. The others are 0.
  template <typename Fill>
  __device__ static void each_vector(const Slice& s, int first, float (&w)[kSpan][kV], Fill fill) {
    if constexpr (kSpan == 1) {
      fill(first, w[0]);
    } else {
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < kV; ++e) w[j][e] = 0.0f;
      }
#pragma unroll 1  // `fill` is long
      for (int j = 0; j < kSpan && s.warp_has(first + j); ++j) {
        float one[kV];
        fill(first + j, one);
#pragma unroll
        for (int to = 0; to < kSpan; ++to) {
#pragma unroll
          for (int e = 0; e < kV; ++e) w[to][e] = to == j ? one[e] : w[to][e];
        }
      }
    }
  }
};

}  // namespace sqk
