// INT8 GEMM with fused dequantization. Public ring: no torch, no CUTLASS, compiles with a plain C++
// compiler.
//
//   acc[m, n] = sum over k of x_q[m, k] * w_q[n, k]                    exact, int32
//   v         = fma(acc * w_scale[n], x_scale[m], bias[n])             float32
//   v         = v + residual[m, n]                                     float32
//   y         = v rounded once to y_dtype, or, for int8,
//               clamp(rint(relu(v) * (1 / out_scale)), -127, 127)
//
// Gated, where w_q holds the rows of gate and up in turns of kGateBlock (`is_gated`):
//   v         = v rounded once to gate_dtype
//   u[m, c]   = activation(v[m, gate row of c]) * v[m, up row of c] * inv_smooth[c]
//   y         = clamp(rint(u * (1 / out_scale)), -127, 127)                    int8, [m, n / 2]
#pragma once

#include <cstdint>

#include "sqk/device.h"
#include "sqk/dtype.h"
#include "sqk/quantize.h"
#include "sqk/status.h"

namespace sqk {

// |x_q * w_q| <= 2^14, so this many products always fit the 32-bit accumulator.
constexpr int64_t kMaxGemmK = 131071;
// The first element of x_q and w_q and the stride of their rows must be multiples of this, in
// bytes.
constexpr int64_t kGemmAlignment = 16;

// Strides are in elements, from one row to the next; within a row elements are adjacent.
struct GemmParams {
  int64_t m;  // tokens; 0 is allowed
  int64_t n;  // output channels, >= 1
  int64_t k;  // 1 .. kMaxGemmK; later elements of a row are ignored

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
  int32_t splits;  // blocks that share a tile's k, if the tile can; 0: chosen
  // 1: a promise that whatever wrote w_q and w_group ended before the kernel before this one in the
  // stream started, as weights that never change keep it. On Hopper, the GEMM for few tokens then
  // requests them before that kernel has ended. 0 is always right.
  int32_t w_constant;

  void* workspace;  // GemmPlan::workspace_bytes, aligned to 16; need not be cleared
  int64_t workspace_bytes;

  // kQuantize: not gated. kSilu, kGelu, kGeluTanh: y_dtype is int8, and there is no residual or
  // relu.
  Producer activation;
  DType gate_dtype;         // a float
  const float* inv_smooth;  // [n / 2] or null
  float* y_scale;           // [m]: *out_scale, or NaN where the row of u has a NaN or Inf

  // W4A8, if not null: [groups, n, 2], a step in [0, 15] and an offset for each group of kW4Group
  // elements of k. w_q is then [n, kW4Bytes * groups], two values in [0, 15] a byte, and w_q_stride
  // is in bytes; the int8 weight is value * step + offset (smoothquant_kernels/reference/w4.py has
  // the order of the values). Missing elements of the last group count as 0, whatever lies there.
  // Dense, aligned to kGemmAlignment. Not gated, and y_dtype is a float.
  const int8_t* w_group;
};

constexpr bool is_w4(const GemmParams& p) { return p.w_group != nullptr; }
// Elements of k that share a step and an offset, and their bytes.
constexpr int64_t kW4Group = 128, kW4Bytes = kW4Group / 2;
constexpr int64_t w4_groups(int64_t k) { return (k + kW4Group - 1) / kW4Group; }

constexpr bool is_gated(const GemmParams& p) { return p.activation != Producer::kQuantize; }
// The columns of y.
constexpr int64_t columns_of_y(const GemmParams& p) { return is_gated(p) ? p.n / 2 : p.n; }

// The architectures that have a table of tiles, and the names of the tables. This is the only list
// of them; Python reads it from the library. `gemm/tiles/tables.h` must include the file of each.
#define SQK_GEMM_TABLES(X) \
  X(Sm80, "sm80")          \
  X(Sm89, "sm89")          \
  X(Sm90, "sm90")

#define SQK_ENUMERATOR(table, text) k##table,
enum class GemmTable : int32_t { SQK_GEMM_TABLES(SQK_ENUMERATOR) };
#undef SQK_ENUMERATOR
#define SQK_NAME(table, text) text,
constexpr const char* kGemmTableNames[] = {SQK_GEMM_TABLES(SQK_NAME)};
#undef SQK_NAME
constexpr int kGemmTables = sizeof(kGemmTableNames) / sizeof(kGemmTableNames[0]);

constexpr const char* name(GemmTable table) { return kGemmTableNames[static_cast<int>(table)]; }

struct GemmPlan {
  GemmTable table;
  int32_t tile;      // row of the table
  int32_t splits;    // blocks that share a tile's k
  int32_t launches;  // kernels; 0 for m = 0
  int32_t overlap;   // 1: may start before the previous kernel in the stream has ended; it waits
  int32_t weights_first;  // 1: and may request w_q before it waits
  int64_t tiles;          // of the output
  int64_t blocks;        // tiles * splits: launched blocks, or units of work of a persistent kernel
  int64_t shared_bytes;  // dynamic, per block; 0 for streaming kernels, which use all there is
  int64_t counter_bytes;  // for splits: at the start of the workspace, for streams without tickets
  int64_t workspace_bytes;
  double expected_clocks;  // an estimate, only for comparing tiles
};

// The tile that was fastest for a problem when measured on this GPU.
struct GemmMeasured {
  int64_t n, k, m;
  int32_t tile;    // row of the table
  int32_t splits;  // >= 1
};

// Pure arithmetic: no GPU is touched. kInvalidArgument: the comments above rule it out.
// kUnsupportedShape: the tile cannot compute the problem or does not fit the GPU. kExcludedTile,
// kUnknownTile: see SQK_WITHOUT_TILES (gemm/excluded.h).
Status plan_gemm(const GemmParams& params, const Device& device, GemmPlan* plan);

// The plan on the current GPU. kUnsupportedArch: the library has no kernels for it.
Status plan(const GemmParams& params, GemmPlan* plan);

// Launches on the current GPU, for which `plan` was made. Allocates nothing and does not wait: safe
// to capture in a CUDA graph.
Status gemm_s8(const GemmParams& params, const GemmPlan& plan, cudaStream_t stream);

// The first entry of SQK_WITHOUT_TILES that names no tile, or "" if all do. Never freed.
const char* unknown_tile();

}  // namespace sqk

// The same for callers without C++. A null stream is the default stream, a null device the current
// GPU.
extern "C" SQK_EXPORT int32_t sqk_gemm_s8(const sqk::GemmParams* params, void* stream);
extern "C" SQK_EXPORT int32_t sqk_gemm_plan(const sqk::GemmParams* params,
                                            const sqk::Device* device, sqk::GemmPlan* plan);
// Sets measured choices for GPUs with this table and this many multiprocessors. Later plans use the
// row with their n and k and a similar m, and the rules if there is none; count 0 removes all rows.
// Results do not change: all tiles give the same bits. kInvalidArgument, with nothing changed: a
// tile that the table does not have or that cannot compute its problem, or two rows for one
// problem. Copies the rows; safe while other threads plan.
extern "C" SQK_EXPORT int32_t sqk_gemm_use_measured(sqk::GemmTable table, int32_t sms,
                                                    const sqk::GemmMeasured* rows, int64_t count);
// From now on no plan takes these rows, in place of those that SQK_WITHOUT_TILES names: their id
// (gemm/excluded.h) or the name alone, separated by commas; "": all rows may be taken; null: what
// the environment says. kUnknownTile for a name that no table has; a list that was given then
// changes nothing. Results do not change. Safe while other threads plan.
extern "C" SQK_EXPORT int32_t sqk_gemm_without_tiles(const char* list);
