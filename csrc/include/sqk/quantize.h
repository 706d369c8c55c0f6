// The producers of int8 activations: quantization alone, or after a norm or an activation function,
// in one pass over each row. Public ring: no torch, no CUTLASS, compiles with a plain C++ compiler.
//
//   quantize              v = x
//   rms_norm_quantize     v = rms_norm(x + residual) * weight
//   layer_norm_quantize   v = layer_norm(x + residual) * weight + bias
//   act_quantize          v = act(x), or act(gate) * x
//
// and then, for all of them (docs/internals/numerics.md specifies the order of the operations, to
// the last bit):
//
//   v       = v * inv_smooth
//   v       = H v                            groups of `rotation` adjacent channels, see below
//   x_scale = max |v| / 127                  per row, per tensor, or given
//   x_q     = clamp(rint(v * (1 / x_scale)), -127, 127)
//
// H is the Hadamard matrix with entries 1 and -1. For h = 1, 2, 4, ..., rotation / 2, in this
// order, and for each pair of channels (i, i + h) with i % (2 h) < h:
//   v[i], v[i + h] = v[i] + v[i + h], v[i] - v[i + h]    each rounded once to float32
#pragma once

#include <cstdint>

#include "sqk/device.h"
#include "sqk/dtype.h"
#include "sqk/status.h"

namespace sqk {

// Every producer and its name. New ones go to the end: their numbers are part of the C entries, and
// the activation functions come last.
#define SQK_PRODUCERS(X)      \
  X(kQuantize, "quantize")    \
  X(kRmsNorm, "rms_norm")     \
  X(kLayerNorm, "layer_norm") \
  X(kRelu, "relu")            \
  X(kGelu, "gelu")            \
  X(kGeluTanh, "gelu_tanh")   \
  X(kSilu, "silu")

#define SQK_ENUMERATOR(producer, text) producer,
enum class Producer : int32_t { SQK_PRODUCERS(SQK_ENUMERATOR) };
#undef SQK_ENUMERATOR
#define SQK_NAME(producer, text) text,
constexpr const char* kProducerNames[] = {SQK_PRODUCERS(SQK_NAME)};
#undef SQK_NAME
constexpr int kProducers = sizeof(kProducerNames) / sizeof(kProducerNames[0]);

constexpr bool is_norm(Producer producer) {
  return producer == Producer::kRmsNorm || producer == Producer::kLayerNorm;
}
constexpr bool is_activation(Producer producer) { return producer >= Producer::kRelu; }

enum class Scheme : int32_t {
  kPerToken = 0,   // x_scale [m], measured
  kPerTensor = 1,  // x_scale [1], measured: two launches and a workspace
  kStatic = 2,     // x_scale [m] = *scale, NaN for a row with a NaN or Inf
};

// How the threads share a row. plan_quantize chooses, unless QuantizeParams::path says otherwise.
enum class QuantizePath : int32_t {
  kAuto = -1,
  kWarp = 0,     // a warp per row, the row in registers
  kBlock = 1,    // a block per row, 8 elements a thread: the shortest time for one row
  kWide = 2,     // a block per row, 32 elements a thread: the most rows in flight
  kLong = 3,     // as kWide, with shared memory for what exceeds registers; the rest is read twice
  kElement = 4,  // as kLong, one element at a time: any alignment
  kCluster = 5,  // a cluster of blocks per row, 8 elements a thread (Hopper)
};
constexpr int kQuantizePaths = 6;

// Whether k channels can be rotated in groups of this size; 0 is no rotation.
constexpr int64_t kMaxRotation = 512;
constexpr bool fits_rotation(int64_t rotation, int64_t k) {
  const bool power_of_two = (rotation & (rotation - 1)) == 0;
  return rotation == 0 ||
         (rotation >= 2 && rotation <= kMaxRotation && power_of_two && k % rotation == 0);
}

// Strides are in elements, from one row to the next; within a row elements are adjacent. Rows may
// start at any multiple of the element's size. Rows that are read may overlap (stride 0 repeats a
// row); rows that are written must not.
struct QuantizeParams {
  Producer producer;
  Scheme scheme;
  DType dtype;        // of x, gate, residual and sum: float32, float16 or bfloat16
  QuantizePath path;  // kAuto, or a path to force: an error if it cannot take the problem
  int64_t m;          // rows (tokens); 0 is allowed
  int64_t k;          // channels, >= 1

  const void* x;  // [m, k]
  int64_t x_stride;
  const void* gate;  // [m, k] or null; activations only
  int64_t gate_stride;
  const void* residual;  // [m, k] or null; norms only
  int64_t residual_stride;
  void* sum;  // [m, k], written if there is a residual
  int64_t sum_stride;

  const void* weight;  // [k] or null; norms only
  const void* bias;    // [k] or null; LayerNorm only
  DType weight_dtype;
  DType bias_dtype;
  double eps;

  int32_t rotation;         // channels of a group: fits_rotation(rotation, k)
  const float* inv_smooth;  // [k] or null
  const float* scale;       // [1], static only

  int8_t* x_q;  // [m, k_padded]; columns from k on are filled with 0
  int64_t x_q_stride;
  int64_t k_padded;  // >= k
  float* x_scale;    // [m], or [1] per tensor

  void* workspace;  // quantize_workspace_bytes(), aligned to 4; need not be cleared
  int64_t workspace_bytes;

  // 1: x and gate are the same [m, 2 k], the product of a gated GEMM (sqk/gemm.h), in which blocks
  // of gate and up take turns. Activations only, and not on a CPU.
  int32_t interleaved;
};

// The channels of gate, and then as many of up, in an interleaved row or weight. The last two
// blocks are shorter if this does not divide k.
constexpr int64_t kGateBlock = 8;

struct QuantizePlan {
  QuantizePath path;
  int32_t threads;       // per block
  int32_t rows;          // per block
  int32_t cluster;       // blocks per row that exchange their maximum in shared memory
  int32_t splits;        // slices of a row that exchange it through the workspace: two launches
  int32_t slice;         // elements per slice
  int32_t slots;         // vectors per thread kept in shared memory, beyond those in registers
  int32_t launches;      // kernels; 0 for m = 0 (except per tensor: its scale must be written)
  int64_t blocks;        // of each launch
  int64_t shared_bytes;  // dynamic, per block
  int64_t workspace_bytes;
};

// Pure arithmetic: no GPU is touched. kInvalidArgument: the comments above rule it out.
Status plan_quantize(const QuantizeParams& params, const Device& device, QuantizePlan* plan);

// The plan on the current GPU.
Status plan(const QuantizeParams& params, QuantizePlan* plan);

// Launches on the current GPU, for which `plan` was made. Allocates nothing and does not wait: safe
// to capture in a CUDA graph.
Status quantize(const QuantizeParams& params, const QuantizePlan& plan, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++. params->producer selects the op; a null stream is the default
// stream.
extern "C" SQK_EXPORT int32_t sqk_quantize(const sqk::QuantizeParams* params, void* stream);
// Bytes of workspace on the current GPU; negative for params that plan_quantize refuses.
extern "C" SQK_EXPORT int64_t sqk_quantize_workspace_bytes(const sqk::QuantizeParams* params);
// A null device is the current GPU.
extern "C" SQK_EXPORT int32_t sqk_quantize_plan(const sqk::QuantizeParams* params,
                                                const sqk::Device* device, sqk::QuantizePlan* plan);
