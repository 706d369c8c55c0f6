// How a layer's work is divided: blocks of rows, tasks, and the workspace. CPU ring: no torch, no
// CUDA.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "cpu/kernels.h"
#include "cpu/scale.h"
#include "cpu/threads.h"
#include "sqk/linear.h"

namespace sqk {

// Bytes of a buffer, so that the next one starts at a cache line.
inline int64_t buffer_bytes(int64_t bytes) { return round_up(bytes, kBufferAlignment); }

// What one task needs to quantize rows: values [k] float32, and some rows of int8.
struct RowScratch {
  float* v;
  int8_t* x_q;
  int64_t stride;  // of x_q

  static int64_t bytes(int64_t k, int64_t rows) {
    const int64_t padded = round_up(k, kVector);
    return buffer_bytes(int64_t{sizeof(float)} * padded) + buffer_bytes(rows * padded);
  }
  RowScratch(void* memory, int64_t k)
      : v(static_cast<float*>(memory)), stride(round_up(k, kVector)) {
    x_q = static_cast<int8_t*>(memory) + buffer_bytes(int64_t{sizeof(float)} * stride);
  }
};

// Plans know no threads, so a workspace is for this many at most.
constexpr int64_t kMostThreads = 256;
// Elements that are worth a thread of their own when rows are quantized: some ten microseconds.
constexpr int64_t kWorthThread = 1 << 15;

// Tasks that quantize `units` units of `elements` elements in total, on this many threads.
inline int64_t quantizer_tasks(int64_t units, int64_t elements, int64_t threads) {
  const int64_t most = units < threads ? units : threads;
  const int64_t wanted = elements / kWorthThread;
  return wanted < 1 ? (most < 1 ? most : 1) : wanted < most ? wanted : most;
}

// Splits [0, size) into `parts` ranges that differ by at most one unit.
struct Range {
  int64_t begin, end;

  static Range of(int64_t size, int64_t unit, int64_t parts, int64_t part) {
    const int64_t units = divide_up(size, unit);
    const auto at = [&](int64_t i) {
      const int64_t position = units * i / parts * unit;
      return position < size ? position : size;
    };
    return {at(part), at(part + 1)};
  }
};

// The quantizer of rows, with the scale of the whole tensor if the scheme has one.
class RowQuantizer {
 public:
  explicit RowQuantizer(const QuantizeParams& params) : params_(params) {
    if (params.scheme == Scheme::kStatic) set_scale(*params.scale);
  }

  // The scale of all rows, from the largest bits of any value.
  float set_absmax(uint32_t absmax) {
    set_scale(scale_of(absmax));
    // The first pass wrote x + residual.
    if (params_.residual != nullptr) {
      params_.x = params_.sum;
      params_.x_stride = params_.sum_stride;
      params_.residual = nullptr;
    }
    return given_;
  }

  uint32_t values(const Kernels& kernels, int64_t row, float* v) const {
    return kernels.values(params_, row, v);
  }

  // Quantizes a row, padded to a multiple of kVector, and returns its scale.
  float quantize(const Kernels& kernels, int64_t row, float* v, int8_t* x_q) const {
    const uint32_t absmax = kernels.values(params_, row, v);
    float scale = given_, inverse = inverse_;
    bool ordinary = false;
    switch (params_.scheme) {
      case Scheme::kPerToken:
        scale = scale_of(absmax);
        inverse = inverse_of(scale);
        ordinary = is_finite_bits(absmax);
        break;
      case Scheme::kPerTensor:
        ordinary = scale < float_of(kInfinityBits);
        break;
      case Scheme::kStatic:
        if (!is_finite_bits(absmax)) scale = float_of(kNanBits);
        break;
    }
    kernels.round(v, round_up(params_.k, kVector), inverse, ordinary, x_q);
    return scale;
  }

 private:
  void set_scale(float scale) {
    given_ = scale;
    inverse_ = inverse_of(scale);
  }

  QuantizeParams params_;
  float given_ = 0.0f, inverse_ = 0.0f;
};

// Measures all rows for the scheme per tensor, in `tasks` tasks with a scratch each, which start
// `stride` bytes apart in `memory`; `maxima` is for one number of each task.
uint32_t largest_value(const RowQuantizer& quantizer, const QuantizeParams& params,
                       const Kernels& kernels, int8_t* memory, int64_t stride, uint32_t* maxima,
                       int64_t tasks, cudaStream_t stream);

}  // namespace sqk
