// PTX instructions under the names of what they do: cp.async, ldmatrix, mma.sync. Kernel ring: no
// torch.
#pragma once

#include <cstdint>

namespace sqk {

// 16 bytes to shared memory past L1, and a hint that the rest of the 128 will be wanted: with 64
// bytes to a row, the next tile wants it.
__device__ inline void copy_async(uint32_t to, const int8_t* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
// The same, of which only the first `bytes` are read; the others become 0.
__device__ inline void copy_async(uint32_t to, const int8_t* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16 bits, which are 8 rows of 16 int8 each: lane 8 i + r names row r of
// matrix i, and lane 4 g + t receives the bytes 4 t ... 4 t + 3 of row g of each.
__device__ inline void load_matrices(uint32_t (&word)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
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

}  // namespace sqk
