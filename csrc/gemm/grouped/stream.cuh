// The GEMM by experts for few rows, whose time is that of reading the experts' weights. Kernel
// ring: no torch.
//
// Each expert that has rows is a problem for the kernel of gemm/stream. The host does not know
// which they are: each block counts them, and all blocks divide them among themselves. So one
// expert with all rows has all blocks.
#pragma once

#include "common/launch.h"
#include "common/reduce.cuh"
#include "gemm/grouped/epilogue.cuh"
#include "gemm/grouped/kernels.h"
#include "gemm/stream/kernel.cuh"
#include "gemm/stream/shape.h"

namespace sqk {

struct GroupedStreamParams {
  StreamParams all;  // of the first expert, but with all rows of y and room for some activations
  const int32_t* offsets;
  const int32_t* rows;  // as in GroupedParams
  int64_t w_q_expert_stride;
  int64_t y_row_bytes;
  int32_t experts;
  int32_t x_rows;
};

// One expert's problem, as a block sees it.
struct ExpertStream : StreamParams {
  int32_t tile0, step;
  const uint32_t* row;  // shared: the row of x_q for each token

  __device__ int first_tile() const { return tile0; }
  __device__ int tile_step() const { return step; }
  __device__ const int8_t* x_row(int token) const { return x_q + row[token] * x_q_stride; }
};

// Where the rows of an expert begin, and those of the one before it end.
__device__ inline int load_offset(const GroupedStreamParams& p, int expert) {
  return max(0, min(load_fresh(p.offsets + expert), p.all.epilogue.m));
}

// A bit for each expert that has rows: lane i holds those of experts 32 i to 32 i + 31.
__device__ inline uint32_t experts_with_rows(const GroupedStreamParams& p) {
  static_assert(kMaxExperts <= 32 * 32);
  constexpr int kBatch = 4;  // of loads in flight, two each
  const int lane = threadIdx.x % 32;
  uint32_t mine = 0;
#pragma unroll 1
  for (int first = 0; first < p.experts; first += 32 * kBatch) {
    int begin[kBatch], end[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int expert = first + 32 * i + lane;
      begin[i] = end[i] = 0;
      if (expert < p.experts) {
        begin[i] = load_offset(p, expert);
        end[i] = load_offset(p, expert + 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t bits = __ballot_sync(kFullWarp, begin[i] < end[i]);
      if (lane == first / 32 + i) mine = bits;
    }
  }
  return mine;
}

// The number of experts that have rows, and the turn-th of them.
class ExpertsWithRows {
 public:
  __device__ explicit ExpertsWithRows(const GroupedStreamParams& p) : mine_(experts_with_rows(p)) {
    until_ = __popc(mine_);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kFullWarp, until_, distance);
      if (threadIdx.x % 32 >= distance) until_ += before;
    }
  }
  __device__ int count() const { return __shfl_sync(kFullWarp, until_, 31); }
  // turn < count()
  __device__ int at(int turn) const {
    const int lane = threadIdx.x % 32;
    const int holder = __ffs(__ballot_sync(kFullWarp, until_ > turn)) - 1;
    const uint32_t bits = __shfl_sync(kFullWarp, mine_, holder);
    const int left = turn - __shfl_sync(kFullWarp, until_, holder) + __popc(bits);
    const bool found = (bits >> lane & 1) && __popc(bits & ((1u << lane) - 1)) == left;
    return 32 * holder + __ffs(__ballot_sync(kFullWarp, found)) - 1;
  }

 private:
  uint32_t mine_;
  int until_;  // how many this lane and those before it hold
};

// Writes zeros to the rows before `begin` and from `end` on. All blocks share their channels.
__device__ inline void clear_other_rows(const Epilogue& e, int begin, int end) {
  for (int row = 0; row < e.m; ++row) {
    if (row >= begin && row < end) continue;
    visit_float(e.y_dtype, [&](auto y) {
      for (int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; channel < e.n;
           channel += int64_t{gridDim.x} * blockDim.x) {
        store_one<decltype(y)::value>(e, 0.0f, 1.0f, row * e.y_stride + channel);
      }
    });
  }
}

// A block's part of the problem of an expert.
__device__ inline ExpertStream expert_stream(const GroupedStreamParams& p, int expert, int begin,
                                             int rows, const uint32_t* row) {
  ExpertStream own = {};
  static_cast<StreamParams&>(own) = p.all;
  own.w_q += expert * p.w_q_expert_stride;
  // Rows that fit are read once per block instead of once per tile.
  own.resident = rows * own.stages * kStage <= own.activation_bytes;
  own.weights_first = false;
  own.row = row + begin;
  Epilogue& e = own.epilogue;
  e = epilogue_of(e, expert, rows);
  if (e.x_per_token) e.x_scale += begin;
  e.y = static_cast<uint8_t*>(e.y) + begin * p.y_row_bytes;
  // Leaves out the code of other epilogues.
  e.residual = nullptr;
  e.w_per_channel = true;
  e.activation = Producer::kQuantize;
  return own;
}

template <int kGroups>
__global__ void __launch_bounds__(32 * kStreamWarps, 1)
    grouped_stream_gemm_kernel(const __grid_constant__ GroupedStreamParams p) {
  using Sums = StreamSums<kGroups>;
  static_assert(kStreamWarps >= kGroupTokens * kGroups);
  extern __shared__ uint4 stream_storage[];
  auto* const storage = reinterpret_cast<uint8_t*>(stream_storage);
  const int warps = blockDim.x / 32, m = p.all.epilogue.m;
  // Only blocks that quantize have other use for this.
  uint32_t* const row =
      reinterpret_cast<Sums*>(storage + warps * kWarpRing<false> + p.all.activation_bytes)->maxima;

  // Which weights to read depends on the offsets, which the kernel before this one may have
  // written.
  wait_for_previous_kernel();
  allow_next_kernel();
  const int first = load_offset(p, 0), last = load_offset(p, p.experts);
  if (threadIdx.x < m) {
    const int32_t given = p.rows != nullptr ? load_fresh(p.rows + threadIdx.x) : threadIdx.x;
    row[threadIdx.x] = max(0, min(given, p.x_rows - 1));
  }
  const ExpertsWithRows experts(p);
  clear_other_rows(p.all.epilogue, first, last);

  // Each expert has as many blocks as the others. More experts than blocks: offsets do not ascend.
  const int count = experts.count();
  const int blocks = max(1, static_cast<int>(gridDim.x) / max(1, count));
  const int turn = blockIdx.x / blocks, tile0 = blockIdx.x - turn * blocks;
  if (turn >= count || tile0 >= p.all.tiles) return;
  const int expert = experts.at(turn);
  const int begin = load_offset(p, expert), rows = load_offset(p, expert + 1) - begin;
  ExpertStream own = expert_stream(p, expert, begin, rows, row);
  own.tile0 = tile0;
  own.step = blocks;
  __syncthreads();  // `row` is there
  stream_gemm<int8_t, kGroups, false>(own);
}

// Warps that would not shorten the longest warp's part of a row are left out: then more blocks may
// share an SM.
inline StreamLaunch choose_grouped_launch(const GroupedParams& params, int groups, int most_warps,
                                          const Device& device) {
  GemmParams gemm = {};
  gemm.m = params.m;
  gemm.k = params.k;
  gemm.n = params.n;
  const StreamLaunch most = choose_launch(gemm, false, groups, most_warps, device);
  if (most.blocks == 0) return most;
  const int64_t stages = stream_stages(params.k, false);
  const int64_t warps = divide_up(stages, divide_up(stages, most.warps));
  // All experts that can have rows share the GPU, and each needs a block.
  const int64_t experts = std::min(params.experts, params.m);
  gemm.n = experts * round_up(params.n, kStreamChannels);
  StreamLaunch launch = choose_launch(gemm, false, groups, static_cast<int>(warps), device);
  launch.blocks = std::max(launch.blocks, experts);
  return launch;
}

template <int kGroups>
Status launch_grouped_stream(const GroupedParams& params, const Device& device,
                             const GroupedPlan& plan, cudaStream_t stream) {
  if (!grouped_stream_serves(kGroupTokens * kGroups, params)) return Status::kUnsupportedShape;
  const int most_warps = GroupedTiles::kTiles[plan.tile].warps_n;
  const StreamLaunch launch = choose_grouped_launch(params, kGroups, most_warps, device);
  if (launch.blocks == 0) return Status::kUnsupportedShape;

  GroupedStreamParams p = {};
  p.all.epilogue = make_grouped_epilogue(params);
  p.all.w_q = params.w_q;
  // As in launch_stream.
  p.all.w_q_stride = params.n > 1 ? params.w_q_stride : 0;
  p.all.x_q = params.x_q;
  p.all.x_q_stride = params.x_rows > 1 ? params.x_q_stride : 0;
  p.all.k = static_cast<int32_t>(params.k);
  p.all.stages = static_cast<int32_t>(stream_stages(params.k, false));
  p.all.tiles = static_cast<int32_t>(divide_up(params.n, kStreamChannels));
  p.all.activation_bytes = static_cast<int32_t>(launch.activation_bytes);
  p.offsets = params.offsets;
  p.rows = params.rows;
  p.w_q_expert_stride = params.w_q_expert_stride;
  p.y_row_bytes = params.y_stride * size_in_bytes(params.y_dtype);
  p.experts = static_cast<int32_t>(params.experts);
  p.x_rows = static_cast<int32_t>(params.x_rows);

  KernelLaunch config = {};
  config.function = reinterpret_cast<const void*>(&grouped_stream_gemm_kernel<kGroups>);
  config.grid = dim3(static_cast<unsigned>(launch.blocks));
  config.block = dim3(static_cast<unsigned>(32 * launch.warps));
  config.shared_bytes = launch.shared_bytes;
  config.stream = stream;
  config.overlap = plan.overlap;
  static DevicesSeen seen;
  const Status status = allow_shared_memory(config.function, device.shared_bytes, 1, seen);
  return status == Status::kSuccess ? launch_kernel(config, &p) : status;
}

}  // namespace sqk
