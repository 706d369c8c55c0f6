// Maxima and sums over the threads that share a row. Kernel ring: no torch.
//
// The order of every sum is fixed by the number of threads, so the same call gives the same bits.
#pragma once

#include <cstdint>

namespace sqk {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kMaxCluster = 8;

// The largest |x|, or NaN if there was one, as bits. The bits of non-negative float32 numbers, read
// as unsigned integers, have the order of the numbers, with Inf above all numbers and NaN above
// Inf; so a maximum of bits never loses a NaN.
class AbsMax {
 public:
  __device__ void add(float x) { asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest_) : "f"(fabsf(x))); }
  __device__ uint32_t bits() const { return __float_as_uint(largest_); }

 private:
  float largest_ = 0.0f;
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = __fadd_rn(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

__device__ inline uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kFullWarp, x); }

// PTX for clusters. cooperative_groups declares its own only for sm_90 and newer, but this code is
// also parsed, though never used, for older GPUs.
struct Cluster {
  __device__ static int blocks() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return static_cast<int>(n);
  }
  __device__ static int rank() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
    return static_cast<int>(n);
  }
  // Tells the others that this block runs. It has written nothing for them yet, so no release is
  // needed.
  __device__ static void arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ static void arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
  __device__ static void wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
  // *here = x, in another block's shared memory.
  __device__ static void write(uint32_t* here, int block, uint32_t x) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(here));
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
  }
};

enum class Group { kWarp, kBlock, kCluster };

// The threads that share a row. Every thread gets the result; all threads must make the same calls.
template <Group kGroup>
class Team {
 public:
  __device__ Team() {
    // No block may write into another's shared memory before that block runs: exchange_blocks waits
    // for this arrival.
    if constexpr (kGroup == Group::kCluster) Cluster::arrive_relaxed();
  }

  // The number of threads of the row, and the index of this one.
  __device__ int size() const {
    if constexpr (kGroup == Group::kWarp) {
      return 32;
    } else {
      return blockDim.x * blocks();
    }
  }
  __device__ int rank() const {
    if constexpr (kGroup == Group::kWarp) {
      return threadIdx.x % 32;
    } else if constexpr (kGroup == Group::kBlock) {
      return threadIdx.x;
    } else {
      return Cluster::rank() * blockDim.x + threadIdx.x;
    }
  }
  // The number of rows in progress at a time, and the index of this one.
  __device__ int64_t teams() const {
    if constexpr (kGroup == Group::kWarp) {
      return int64_t{gridDim.x} * (blockDim.x / 32);
    } else {
      return gridDim.x / blocks();
    }
  }
  __device__ int64_t team() const {
    if constexpr (kGroup == Group::kWarp) {
      return int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
    } else {
      return blockIdx.x / blocks();
    }
  }

  __device__ float sum(float x) {
    x = warp_sum(x);
    // A missing warp or block counts as +0, whose bits are 0.
    if constexpr (kGroup != Group::kWarp) {
      x = warp_sum(__uint_as_float(exchange_warps(__float_as_uint(x))));
    }
    if constexpr (kGroup == Group::kCluster) {
      x = warp_sum(__uint_as_float(exchange_blocks(__float_as_uint(x))));
    }
    return x;
  }

  __device__ uint32_t max(uint32_t x) {
    x = warp_max(x);
    if constexpr (kGroup != Group::kWarp) x = warp_max(exchange_warps(x));
    if constexpr (kGroup == Group::kCluster) x = warp_max(exchange_blocks(x));
    return x;
  }

 private:
  __device__ int blocks() const {
    if constexpr (kGroup == Group::kCluster) {
      return Cluster::blocks();
    } else {
      return 1;
    }
  }

  // Lane i gets warp i's value, or 0 if there is no such warp. Two buffers are used in turn, so one
  // barrier per exchange is enough: the other buffer's barrier lies between a buffer's reads and
  // its next writes.
  __device__ uint32_t exchange_warps(uint32_t x) {
    __shared__ uint32_t buffer[2][kMaxWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    turn_ ^= 1;
    if (lane == 0) buffer[turn_][warp] = x;
    __syncthreads();
    return lane < static_cast<int>(blockDim.x / 32) ? buffer[turn_][lane] : 0u;
  }

  // Lane i gets block i's value, or 0 if there is no such block. The barrier also keeps a block
  // alive until the others have written to it. Must follow exchange_warps, whose turn it shares.
  __device__ uint32_t exchange_blocks(uint32_t x) {
    __shared__ uint32_t buffer[2][kMaxCluster];
    const int lane = threadIdx.x % 32;
    if (!all_run_) Cluster::wait();
    all_run_ = true;
    if (static_cast<int>(threadIdx.x) < blocks()) {
      Cluster::write(&buffer[turn_][Cluster::rank()], threadIdx.x, x);
    }
    __syncwarp();  // .aligned needs whole warps
    Cluster::arrive();
    Cluster::wait();
    return lane < blocks() ? buffer[turn_][lane] : 0u;
  }

  int turn_ = 0;
  bool all_run_ = false;
};

}  // namespace sqk
