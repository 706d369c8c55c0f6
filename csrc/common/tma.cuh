// Hopper's copies of whole tiles (TMA), the tensor maps that describe them, and the barriers in
// shared memory that count their bytes. Addresses in shared memory are 32-bit. Kernel ring: no
// torch.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/driver.h"
#include "sqk/status.h"

namespace sqk {

// --- barriers ----------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A phase ends when this many threads have arrived and all expected bytes have.
__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes barriers that this thread has initialized visible to TMA and to the cluster. A barrier of
// the block or the cluster must follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and lets the phase wait for this many bytes too.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the barrier that another block of the cluster has at the same address.
__device__ inline void arrive_in(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// Waits for the end of the phase with this parity. Phases alternate and start with 0; of a new
// barrier, the phase before the first one has parity 1 and has ended.
__device__ inline void wait_for_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Which stage of a ring is next. The parity is that of the phase in which it becomes full.
template <int kStages>
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void step() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// All threads of the cluster.
__device__ inline void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// --- copies ------------------------------------------------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Copies a box to shared memory; what is outside the tensor becomes 0. `barrier` counts all bytes
// of the box.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int32_t x, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2}], [%3];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(barrier)
      : "memory");
}
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int32_t x, int32_t y,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int32_t x, int32_t y,
                                int32_t z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4}], [%5];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// A box of a matrix to all blocks of the cluster in `mask`, where each block's barrier counts the
// bytes.
__device__ inline void copy_box_to(uint16_t mask, uint32_t to, const CUtensorMap& map, int32_t x,
                                   int32_t y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(y), "r"(barrier), "h"(mask)
      : "memory");
}

// --- tensor maps -------------------------------------------------------------------------------

// A matrix of bytes. Its rows start at multiples of 16; `stride` is not less than `columns`.
struct ByteMatrix {
  const void* base;
  int64_t rows, columns, stride;
};

inline CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* base,
                           uint32_t rank, const cuuint64_t* size, const cuuint64_t* stride,
                           const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = driver_function<Encode>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  const cuuint32_t every[] = {1, 1, 1};
  return encode(map, type, rank, const_cast<void*>(base), size, stride, box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Boxes of `rows` x `columns` bytes.
inline Status encode_matrix(CUtensorMap* map, const ByteMatrix& matrix, uint32_t rows,
                            uint32_t columns, CUtensorMapSwizzle swizzle) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(matrix.columns),
                             static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(matrix.stride)};
  const cuuint32_t box[] = {columns, rows};
  const CUresult result =
      encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, matrix.base, 2, size, stride, box, swizzle);
  return result == CUDA_SUCCESS ? Status::kSuccess : Status::kInvalidArgument;
}

// The same for `count` matrices, each `distance` bytes after the one before: a multiple of their
// stride. What a box has beyond the last row of its matrix becomes 0.
inline Status encode_matrices(CUtensorMap* map, const ByteMatrix& first, int64_t count,
                              int64_t distance, uint32_t rows, uint32_t columns,
                              CUtensorMapSwizzle swizzle) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(first.columns),
                             static_cast<cuuint64_t>(first.rows), static_cast<cuuint64_t>(count)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(first.stride),
                               static_cast<cuuint64_t>(distance)};
  const cuuint32_t box[] = {columns, rows, 1};
  const CUresult result =
      encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, first.base, 3, size, stride, box, swizzle);
  return result == CUDA_SUCCESS ? Status::kSuccess : Status::kInvalidArgument;
}

// `count` elements of 2 bytes, in boxes of `box`. A box may start at any element.
inline Status encode_vector(CUtensorMap* map, const void* base, int64_t count, uint32_t box) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(count)};
  const cuuint64_t no_stride[] = {0};
  const CUresult result = encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, base, 1, size, no_stride,
                                     &box, CU_TENSOR_MAP_SWIZZLE_NONE);
  return result == CUDA_SUCCESS ? Status::kSuccess : Status::kInvalidArgument;
}

}  // namespace sqk
