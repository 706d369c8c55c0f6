// INT8 GEMM by mma.sync, for GPUs without wgmma. Kernel ring: no torch.
//
// A block computes a tile of y: cp.async keeps kStages - 1 tiles of x_q and w_q in flight while
// ldmatrix and mma.sync work on one. When there are too few tiles for all SMs, several blocks share
// a tile's k: each writes its sums to the workspace, and the last one to finish adds up all of
// them.
#pragma once

#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "common/memory_order.cuh"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"
#include "common/tickets.h"
#include "gemm/epilogue/gated_tokens.cuh"
#include "gemm/splits.h"

namespace sqk {

struct MmaParams {
  const int8_t* x_q;
  const int8_t* w_q;
  int64_t x_q_stride, w_q_stride;
  int32_t k;
  int32_t k_tiles;
  int32_t m_tiles, n_tiles;
  int32_t group;      // tiles along m that are computed before the next ones along n
  int32_t splits;     // blocks per tile
  uint32_t* tickets;  // [tiles], 0 before the launch and after it; for splits > 1
  int4* partials;     // [splits, tiles, kM * kN / 4]; for splits > 1
  Epilogue epilogue;
};

// A thread's share of copying one operand's tiles: one piece of every kStep-th row.
template <int kRows, int kK, int kThreads>
class TileCopy {
 public:
  static constexpr int kPieces = kK / 16;
  static constexpr int kStep = kThreads / kPieces;
  static constexpr int kCopies = kRows / kStep;
  // kStep % 8 == 0: all rows of a thread have the same swizzle, so their distances are fixed.
  static_assert(kThreads % kPieces == 0 && kRows % kStep == 0 && kStep % 8 == 0);

  // Out-of-range rows are clamped to the last row, so the loop needs no predicate and a warp reads
  // that row once; their results are never stored.
  __device__ TileCopy(const int8_t* base, int64_t stride, uint32_t row0, uint32_t rows)
      : TileCopy(base, stride, row0, rows, [](uint32_t row) { return row; }) {}

  // The same, but place(row) says where each row is.
  template <typename Place>
  __device__ TileCopy(const int8_t* base, int64_t stride, uint32_t row0, uint32_t rows,
                      const Place& place)
      : piece_(threadIdx.x % kPieces) {
    const uint32_t row = threadIdx.x / kPieces;
    to_ = swizzled<kK>(row, piece_);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      from_[i] = base + place(min(row0 + row + i * kStep, rows - 1)) * stride + 16 * piece_;
    }
  }

  // Copies the tile that starts at element k, of which only the first `valid` elements count.
  __device__ void copy_part(uint32_t stage, int64_t k, int valid) const {
    const int bytes = max(0, min(16, valid - 16 * piece_));
    const int64_t offset = bytes > 0 ? k : -16 * piece_;  // keeps the address inside the row
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async(stage + to_ + i * kStep * kK, from_[i] + offset, bytes);
    }
  }

  __device__ void advance(int64_t bytes) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) from_[i] += bytes;
  }

  // Copies the tile that `advance` has reached.
  __device__ void copy_whole(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy_async(stage + to_ + i * kStep * kK, from_[i]);
  }

 private:
  const int8_t* from_[kCopies];
  int to_;
  int piece_;
};

// Which tile a block works on: along m within a group, then along n, then the next group. So blocks
// that run at the same time need few distinct rows of both operands, the weights are read once per
// group, and the group's tokens stay in L2.
struct TilePosition {
  uint32_t m, n;
};
__device__ inline TilePosition tile_position(uint32_t m_tiles, uint32_t n_tiles, uint32_t group,
                                             uint32_t tile) {
  if (m_tiles == 1) return {0, tile};  // with few tokens, divisions would take too long
  const uint32_t in_group = group * n_tiles;
  const uint32_t first = tile / in_group * group;
  const uint32_t rows = min(group, m_tiles - first);  // the last group may be smaller
  const uint32_t rest = tile % in_group;
  return {first + rest % rows, rest / rows};
}
__device__ inline TilePosition tile_position(const MmaParams& p, uint32_t tile) {
  return tile_position(p.m_tiles, p.n_tiles, p.group, tile);
}

// Adds up the sums of the blocks that share a tile; true for the one block that then has the total.
// Each thread has kWords words of 16 bytes, stored in the order of the threads, so that reads and
// writes cover whole lines.
template <int kWords, int kThreads>
__device__ bool combine_splits(const MmaParams& p, uint32_t tile, uint32_t split, int32_t* acc) {
  const int64_t words = int64_t{kWords} * kThreads;
  const int64_t tiles = int64_t{p.m_tiles} * p.n_tiles;
  int4* slot = p.partials + (split * tiles + tile) * words + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int32_t* sum = acc + 4 * i;
    __stcg(slot + i * kThreads, make_int4(sum[0], sum[1], sum[2], sum[3]));
  }
  // The barrier orders the whole block's sums before one thread's ticket, and that thread's fence
  // makes them visible with it. The fence after the ticket does the same for the sums of earlier
  // blocks, and the second barrier passes this on to the other threads.
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence_gpu();
    last = atomicAdd(p.tickets + tile, 1u) + 1 == p.splits;
    fence_gpu();
    if (last) p.tickets[tile] = 0;  // for the next launch: nobody else takes one in this launch
  }
  if (!__syncthreads_or(last)) return false;
#pragma unroll 1
  for (int other = 0; other < p.splits; ++other) {
    if (other == split) continue;
    const int4* theirs = p.partials + (other * tiles + tile) * words + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int4 sum = load_fresh(theirs + i * kThreads);
      acc[4 * i] += sum.x;
      acc[4 * i + 1] += sum.y;
      acc[4 * i + 2] += sum.z;
      acc[4 * i + 3] += sum.w;
    }
  }
  return true;
}

// Stores a warp's kRows x 16 tokens from `token0`, of 8 kBlocks channels from `channel0`: the sums
// that each 16 tokens have in a lane, one after the other.
template <int kRows, int kBlocks, bool kGated>
__device__ inline void store_rows(const Epilogue& epilogue, int32_t* acc, int token0,
                                  int channel0) {
  constexpr int kWords = 4 * kBlocks;
  // Registers cannot be indexed at run time, and unrolling would repeat the long epilogue for every
  // i. So the rows move up instead.
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
    // Pretends that channel0 changes. Otherwise the compiler moves the loads per channel out of the
    // loop and spills them.
    asm volatile("" : "+r"(channel0));
    if constexpr (kGated) {
      store_gated_tokens<kBlocks>(epilogue, acc, token0 + 16 * i, channel0);
    } else {
      store_tokens<kBlocks>(epilogue, acc, token0 + 16 * i, channel0);
    }
#pragma unroll
    for (int word = 0; word < (kRows - 1) * kWords; ++word) acc[word] = acc[word + kWords];
  }
}

// Two blocks of 128 threads can use 255 registers a thread. Without the second bound, ptxas aims
// for more blocks and spills.
constexpr int mma_blocks_per_sm(int threads) { return threads <= 128 ? 2 : 1; }

// How the warps of a block share its tile, and what a thread has of it.
template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages>
struct MmaTile {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kRows = kWarpM / 16, kColumns = kWarpN / 16;  // of 16 tokens, 16 channels
  static constexpr int kSteps = kK / 32;
  static constexpr int kStageBytes = (kM + kN) * kK;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kSteps % 2 == 0 && kStages >= 2);
  using XCopy = TileCopy<kM, kK, kThreads>;
  using WCopy = TileCopy<kN, kK, kThreads>;
  using Sums = int32_t[kRows][kColumns][8];

  // The first token and channel of this thread's warp.
  static __device__ int warp_m() { return threadIdx.x / 32 / kWarpsN * kWarpM; }
  static __device__ int warp_n() { return threadIdx.x / 32 % kWarpsN * kWarpN; }

  // Adds the products of `range`, a part of k in tiles, to acc.
  static __device__ void multiply(XCopy& x, WCopy& w, int32_t k, SplitRange range, Sums& acc);
};

template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages>
__device__ __forceinline__ void MmaTile<kM, kN, kK, kWarpsM, kWarpsN, kStages>::multiply(
    XCopy& x, WCopy& w, int32_t k, SplitRange range, Sums& acc) {
  extern __shared__ __align__(128) int8_t stages[];
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(stages));

  // The last tile of the range comes first. Only it may be partial, which needs byte counts; the
  // loop then sees whole tiles only. Integer sums do not depend on the order.
  const int64_t k_first = int64_t{range.first} * kK, k_last = k_first + (range.count - 1) * kK;
  const int valid = static_cast<int>(min(int64_t{kK}, k - k_last));
  x.copy_part(shared, k_last, valid);
  w.copy_part(shared + kM * kK, k_last, valid);
  commit_copies();
  x.advance(k_first);
  w.advance(k_first);
#pragma unroll
  for (int i = 1; i < kStages - 1; ++i) {
    if (i < range.count) {
      x.copy_whole(shared + i * kStageBytes);
      w.copy_whole(shared + i * kStageBytes + kM * kK);
    }
    x.advance(kK);
    w.advance(kK);
    commit_copies();
  }

  // Lane 8 i + r reads row r of matrix i. For x_q, tokens 0-7 and 8-15 of the first 16 bytes, then
  // of the second: the order of the four words in mma.sync. For w_q, both pieces of channels 0-7,
  // then of channels 8-15.
  const int lane = threadIdx.x % 32;
  const uint32_t x_lane = swizzled<kK>(warp_m() + lane % 16, lane / 16);
  const uint32_t w_lane = kM * kK + swizzled<kK>(warp_n() + lane / 16 * 8 + lane % 8, lane / 8 % 2);

  uint32_t a[2][kRows][4], b[2][kColumns][4];
  const auto load_step = [&](uint32_t stage, int step) {
    // Two pieces further: XOR works because the swizzle is an XOR and nothing else sets these bits.
    const uint32_t from_x = (stage + x_lane) ^ 32 * step, from_w = (stage + w_lane) ^ 32 * step;
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_matrices(a[step % 2][i], from_x + i * 16 * kK);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) load_matrices(b[step % 2][j], from_w + j * 16 * kK);
  };

  wait_for_copies<kStages - 2>();
  __syncthreads();
  constexpr uint32_t kEnd = kStages * kStageBytes;
  uint32_t read = 0, write = kEnd - kStageBytes;  // stages, in bytes
  load_step(shared, 0);
#pragma unroll 1
  for (int done = 0; done < range.count; ++done) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        // The next tile must have arrived. All warps must also have read this one, because the next
        // turn's copies overwrite its stage: one barrier for both.
        wait_for_copies<kStages - 2>();
        __syncthreads();
        read = read + kStageBytes == kEnd ? 0 : read + kStageBytes;
      }
      load_step(shared + read, (step + 1) % kSteps);  // after the last tile: never used
      if (step == 0) {
        if (done + kStages - 1 < range.count) {
          x.copy_whole(shared + write);
          w.copy_whole(shared + write + kM * kK);
        }
        x.advance(kK);  // also past the end: a condition would cost more
        w.advance(kK);
        commit_copies();  // also when empty: wait_for_copies counts groups
        write = write + kStageBytes == kEnd ? 0 : write + kStageBytes;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const uint32_t (&w)[4] = b[step % 2][j];
          multiply_add(acc[i][j], a[step % 2][i], {w[0], w[1]});
          multiply_add(acc[i][j] + 4, a[step % 2][i], {w[2], w[3]});
        }
      }
    }
  }
}

template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages, bool kGated>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN, mma_blocks_per_sm(32 * kWarpsM * kWarpsN))
    mma_gemm_kernel(const __grid_constant__ MmaParams p) {
  using Tile = MmaTile<kM, kN, kK, kWarpsM, kWarpsN, kStages>;
  const uint32_t tiles = static_cast<uint32_t>(p.m_tiles) * p.n_tiles;
  const uint32_t split = p.splits > 1 ? blockIdx.x / tiles : 0;
  const uint32_t tile = blockIdx.x - split * tiles;
  const TilePosition position = tile_position(p, tile);
  typename Tile::XCopy x(p.x_q, p.x_q_stride, position.m * kM, p.epilogue.m);
  typename Tile::WCopy w(p.w_q, p.w_q_stride, position.n * kN, p.epilogue.n);
  typename Tile::Sums acc = {};
  Tile::multiply(x, w, p.k, split_range(p.k_tiles, p.splits, split), acc);

  constexpr int kWords = Tile::kRows * Tile::kColumns * 2;
  if (p.splits > 1 && !combine_splits<kWords, Tile::kThreads>(p, tile, split, acc[0][0])) return;
  store_rows<Tile::kRows, 2 * Tile::kColumns, kGated>(
      p.epilogue, acc[0][0], position.m * kM + Tile::warp_m(), position.n * kN + Tile::warp_n());
}

// How many tokens the tiles of a group cover. An A100 or an RTX 4090 runs 200 to 300 blocks of some
// 128 x 128 at a time: as a square they are 2048 tokens high, which at K = 8192 take 16 MiB of L2.
constexpr int32_t kRasterTokens = 2048;

// Fills in the parameters of a kernel with this tile, and clears the tickets if the stream has
// none.
template <int kM, int kN, int kK>
Status make_mma_params(const GemmParams& params, const GemmPlan& plan, cudaStream_t stream,
                       MmaParams& p) {
  const int64_t m_tiles = divide_up(params.m, kM), n_tiles = divide_up(params.n, kN);
  const int64_t k_tiles = divide_up(params.k, kK), tiles = m_tiles * n_tiles;
  const int64_t splits = plan.splits < 1 ? 1 : plan.splits < k_tiles ? plan.splits : k_tiles;
  // Positions of rows and columns, and the number of blocks, are 32-bit.
  if (m_tiles * kM > INT32_MAX || n_tiles * kN > INT32_MAX || tiles * splits > INT32_MAX) {
    return Status::kUnsupportedShape;
  }

  p = {};
  p.x_q = params.x_q;
  p.w_q = params.w_q;
  p.x_q_stride = params.x_q_stride;
  p.w_q_stride = params.w_q_stride;
  p.k = static_cast<int32_t>(params.k);
  p.k_tiles = static_cast<int32_t>(k_tiles);
  p.m_tiles = static_cast<int32_t>(m_tiles);
  p.n_tiles = static_cast<int32_t>(n_tiles);
  // Groups of equal size: a last group with one or two tiles would read all weights just for them.
  const int64_t groups = divide_up(m_tiles, kRasterTokens / kM);
  p.group = static_cast<int32_t>(divide_up(m_tiles, groups));
  p.splits = static_cast<int32_t>(splits);
  p.epilogue = make_epilogue(params);

  if (splits > 1) {
    const int64_t counters = split_counter_bytes(tiles);
    p.partials = reinterpret_cast<int4*>(static_cast<int8_t*>(params.workspace) + counters);
    p.tickets = tiles <= kTickets ? find_tickets(stream) : nullptr;
    if (p.tickets == nullptr) {
      p.tickets = static_cast<uint32_t*>(params.workspace);
      const Status status = status_from_call(cudaMemsetAsync(p.tickets, 0, counters, stream));
      if (status != Status::kSuccess) return status;
    }
  }
  return Status::kSuccess;
}

// Launches a kernel for mma.sync. kKernel has one type for all tiles, so `seen` is one per kernel.
template <auto kKernel, int kThreads, int kSharedBytes, typename Params>
Status launch_mma_kernel(Params p, cudaStream_t stream) {
  KernelLaunch launch = {};
  launch.function = reinterpret_cast<const void*>(kKernel);
  launch.grid = dim3(static_cast<unsigned>(p.m_tiles) * p.n_tiles * p.splits);
  launch.block = dim3(kThreads);
  launch.shared_bytes = kSharedBytes;
  launch.stream = stream;
  static DevicesSeen seen;
  const Status status =
      allow_shared_memory(launch.function, kSharedBytes, mma_blocks_per_sm(kThreads), seen);
  return status == Status::kSuccess ? launch_kernel(launch, &p) : status;
}

template <int kM, int kN, int kK, int kWarpsM, int kWarpsN, int kStages, bool kGated>
Status launch_mma(const GemmParams& params, const Device&, const GemmPlan& plan,
                  cudaStream_t stream) {
  MmaParams p;
  const Status status = make_mma_params<kM, kN, kK>(params, plan, stream, p);
  if (status != Status::kSuccess) return status;
  constexpr auto* kKernel = &mma_gemm_kernel<kM, kN, kK, kWarpsM, kWarpsN, kStages, kGated>;
  return launch_mma_kernel<kKernel, 32 * kWarpsM * kWarpsN, kStages*(kM + kN) * kK>(p, stream);
}

}  // namespace sqk
