// INT8 GEMM with fused dequantisation, and the whole linear layer: quantise, then multiply. Public
// ring: no torch, no CUTLASS, compiles with a plain C++ compiler.
//
//   acc[m, n] = sum over k of x_q[m, k] * w_q[n, k]                    exact, int32
//   v         = fma(acc * w_scale[n], x_scale[m], bias[n])             float32
//   v         = v + residual[m, n]                                     float32
//   y         = v rounded once to y_dtype, or, for int8,
//               clamp(rint(relu(v) * (1 / out_scale)), -127, 127)
#pragma once

#include <cstdint>

#include "sqk/dtype.h"
#include "sqk/quantize.h"
#include "sqk/status.h"

namespace sqk {

// |x_q * w_q| <= 2^14, so this many products always fit the 32-bit accumulator.
constexpr int64_t kMaxGemmK = 131071;
// What x_q and w_q must be aligned to, in bytes: their first element and the stride of their rows.
constexpr int64_t kGemmAlignment = 16;

// Strides are in elements, from one row to the next; within a row elements are adjacent.
struct GemmParams {
  int64_t m;  // tokens; 0 is allowed
  int64_t n;  // output channels, >= 1
  int64_t k;  // 1 .. kMaxGemmK; nothing behind a row's k-th element counts

  const int8_t* x_q;  // [m, k]
  int64_t x_q_stride;
  const int8_t* w_q;  // [n, k]
  int64_t w_q_stride;
  const float* x_scale;   // [m] or [1]
  const float* w_scale;   // [n] or [1]
  int32_t x_per_token;    // 1: x_scale is [m]
  int32_t w_per_channel;  // 1: w_scale is [n]
  const float* bias;      // [n] or null
  const void* residual;   // [m, n] of residual_dtype, or null; not for int8
  int64_t residual_stride;

  void* y;  // [m, n] of y_dtype
  int64_t y_stride;
  const float* out_scale;  // [1], for int8 only
  DType y_dtype;
  DType residual_dtype;
  int32_t relu;  // 1: negative values become 0; for int8 only

  int32_t tile;    // a row of the current GPU's table, or -1: chosen by its rules
  int32_t splits;  // blocks that share a tile's k, where the tile can; 0: chosen

  void* workspace;  // GemmPlan::workspace_bytes, aligned to 16; need not be cleared
  int64_t workspace_bytes;
};

// Which kernels serve a GPU.
enum class GemmTable : int32_t { kSm80 = 0, kSm89 = 1, kSm90 = 2 };
constexpr int kGemmTables = 3;

// What the choice depends on besides the problem.
struct GemmDevice {
  int32_t sms;           // that the current context may use
  int32_t capability;    // 10 * major + minor
  int32_t shared_bytes;  // the most that one block can be given
  int32_t wgmma;         // 1: the library holds the kernels for 9.0a and this GPU runs them
  int32_t part;          // 1: the GPU has more sms than the context may use: no stream-K
};

struct GemmPlan {
  GemmTable table;
  int32_t tile;           // row of the table
  int32_t splits;         // blocks that share a tile's k
  int32_t launches;       // kernels; 0 for m = 0
  int32_t overlap;        // 1: may start while the kernel before it in the stream ends
  int64_t tiles;          // of the output
  int64_t blocks;         // tiles * splits, as launched or, for persistent kernels, as worked off
  int64_t shared_bytes;   // dynamic, per block; of streaming kernels, which fill what is there: 0
  int64_t counter_bytes;  // of splits, at the start of the workspace, cleared before the launch
  int64_t workspace_bytes;
  double expected_clocks;  // what the choice went by: an estimate, for comparisons only
};

// What was measured to be best for a problem, on the GPU that is there.
struct GemmMeasured {
  int64_t n, k, m;
  int32_t tile;    // row of the table
  int32_t splits;  // >= 1
};

// Pure arithmetic: no GPU is touched. kInvalidArgument for what the comments above rule out,
// kUnsupportedShape for a tile that cannot serve the problem or does not fit the GPU, kExcludedTile
// and kUnknownTile as SQK_WITHOUT_TILES has it.
Status plan_gemm(const GemmParams& params, const GemmDevice& device, GemmPlan* plan);

// The current GPU, asked for once per device.
Status gemm_device(GemmDevice* device);

// The plan on the current GPU. Also kUnsupportedArch: the library holds no kernels for it.
Status plan(const GemmParams& params, GemmPlan* plan);

// Launches on the current GPU, which `plan` is for. Nothing is allocated, nothing waits: safe to
// capture in a CUDA graph.
Status gemm_s8(const GemmParams& params, const GemmPlan& plan, cudaStream_t stream);

// A linear layer: quantize.x -> quantize.x_q, quantize.x_scale -> gemm.y, of one m and k. gemm's
// x_q, its stride, x_scale and x_per_token are not read. With few tokens and no norm or activation
// in front both are one launch (plan.fused), and quantize.x_q and quantize.x_scale may be null.
struct LinearParams {
  QuantizeParams quantize;
  GemmParams gemm;
};

struct LinearPlan {
  QuantizePlan quantize;  // empty where fused
  GemmPlan gemm;
  int32_t fused;
  int64_t workspace_bytes;  // for both, one after the other; linear.gemm.workspace
};

Status plan(const LinearParams& params, LinearPlan* plan);
Status linear_s8(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream);

}  // namespace sqk

// The same for callers without C++; stream null: the default one, device null: the current GPU.
extern "C" SQK_EXPORT int32_t sqk_gemm_s8(const sqk::GemmParams* params, void* stream);
extern "C" SQK_EXPORT int32_t sqk_gemm_plan(const sqk::GemmParams* params,
                                            const sqk::GemmDevice* device, sqk::GemmPlan* plan);
extern "C" SQK_EXPORT int32_t sqk_linear_s8(const sqk::LinearParams* params, void* stream);
extern "C" SQK_EXPORT int32_t sqk_linear_plan(const sqk::LinearParams* params,
                                              sqk::LinearPlan* plan);
// From now on plans for GPUs with this table and as many multiprocessors take what was measured for
// their n and k and about as many tokens, and the rules else; count 0: the rules alone. Results do
// not change: all tiles give the same bits. kInvalidArgument, and nothing is changed, for a row
// that the table does not hold or that cannot serve its problem, and where two are of the same
// problem. Copies the rows; safe while other threads plan.
extern "C" SQK_EXPORT int32_t sqk_gemm_use_measured(sqk::GemmTable table, int32_t sms,
                                                    const sqk::GemmMeasured* rows, int64_t count);
// From now on no plan takes these rows, in place of those that SQK_WITHOUT_TILES names: their id
// (gemm/excluded.h) or the name alone, separated by commas; "": all rows may be taken; null: what
// the environment says. kUnknownTile for a name that no table has; a list that was given then
// changes nothing. Results do not change. Safe while other threads plan.
extern "C" SQK_EXPORT int32_t sqk_gemm_without_tiles(const char* list);
// The current GPU.
extern "C" SQK_EXPORT int32_t sqk_gemm_device(sqk::GemmDevice* device);
