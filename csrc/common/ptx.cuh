// PTX instructions as functions: cp.async, ldmatrix, mma.sync. Kernel ring: no torch.
#pragma once

#include <cstdint>

namespace sqk {

// Copies 16 bytes to shared memory, bypassing L1. The hint fetches the rest of the 128-byte line
// too: with 64 bytes a row, the next tile reads it.
__device__ inline void copy_async(uint32_t to, const int8_t* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
// The same, but reads only the first `bytes` and fills the rest with 0.
__device__ inline void copy_async(uint32_t to, const int8_t* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
// One word, through L1: cp.async.cg takes 16 bytes only. Filled with 0 if `bytes` is 0.
__device__ inline void copy_word_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements, that is, 8 rows of 16 int8 each. Lane 8 i + r gives
// the address of row r of matrix i; lane 4 g + t receives bytes 4 t to 4 t + 3 of row g of each
// matrix.
__device__ inline void load_matrices(uint32_t (&word)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

// The same, but of each pair of bytes as one element of the transposed matrix: lane 4 g + t
// receives bytes 2 g and 2 g + 1 of row 2 t in its low half, and of row 2 t + 1 in its high half.
__device__ inline void load_transposed(uint32_t (&word)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

// acc[16 rows, 8 columns] += a[16 rows, 32 of k] * b[32 of k, 8 columns]
__device__ inline void multiply_add(int32_t* acc, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// acc[16 rows, 8 columns] += a[16 rows, 16 of k] * b[16 of k, 8 columns], float16 into float32.
__device__ inline void multiply_add_halves(float (&acc)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sqk
