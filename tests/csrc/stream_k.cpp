// Prints which block works on which part of which tile under CUTLASS's stream-K schedule. It runs
// on the host, for tests/csrc/test_stream_k.py. Reads lines of "row m n k sms clusters" (m, n: the
// instruction's) and prints "grid x y", then a line for each part: block, turn of the block, tile,
// first tile of k, number of tiles of k.
//
// CUDA's declarations come first. None of them does anything on the host.
#include <cuda_runtime.h>

static dim3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
}
inline void __syncthreads() {}
inline void __syncwarp() {}
inline void __threadfence() {}
template <class T>
T atomicAdd(T*, T value) {
  return value;
}
template <class T>
T atomicCAS(T*, T, T value) {
  return value;
}

#include <cstdio>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/kernel/sm90_tile_scheduler_stream_k.hpp"

template <int kM, int kN, int kK, int kClusterM, int kClusterN>
void print_parts(int m, int n, int k, int sms, int clusters) {
  using Tile = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;
  using Scheduler =
      cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster>;
  typename Scheduler::Arguments arguments;
  arguments.decomposition_mode = Scheduler::DecompositionMode::StreamK;
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = sms;
  hardware.max_active_clusters = clusters;
  const auto problem = cute::make_shape(m, n, k, 1);
  const auto params =
      Scheduler::to_underlying_arguments(problem, Tile{}, Cluster{}, hardware, arguments, nullptr);
  const dim3 grid =
      Scheduler::get_grid_shape(params, problem, Tile{}, Cluster{}, hardware, arguments);
  const bool along_n = params.raster_order_ == Scheduler::RasterOrder::AlongN;
  std::printf("grid %u %u\n", grid.x, grid.y);
  // The order in which the hardware starts blocks: x first, and cluster by cluster.
  const unsigned blocks = grid.x * grid.y;
  for (unsigned block = 0; block < blocks; ++block) {
    const unsigned x = along_n ? block % grid.x : block / grid.y;
    const unsigned y = along_n ? block / grid.x : block % grid.y;
    const dim3 in_cluster(x % kClusterM, y % kClusterN, 0);
    int turn = 0;
    for (uint64_t unit = block;; unit += blocks) {
      uint32_t start = 0;
      auto work = Scheduler::get_current_work_for_linear_idx(start, unit, in_cluster, params);
      if (!work.is_valid()) break;
      do {
        std::printf("%u %d %d %d %d %u\n", block, turn++, work.M_idx, work.N_idx, work.K_idx,
                    work.k_tile_count);
      } while (
          Scheduler::continue_current_work_for_linear_idx(unit, start, in_cluster, work, params));
    }
  }
}

int main() {
  int row, m, n, k, sms, clusters;
  while (std::scanf("%d %d %d %d %d %d", &row, &m, &n, &k, &sms, &clusters) == 6) {
    switch (row) {
      ROWS  // case 4: print_parts<128, 32, 256, 1, 1>(m, n, k, sms, clusters); break;
    }
    std::printf("end\n");
  }
}
