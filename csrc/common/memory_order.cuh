// Loads and fences whose order matters: they read what another block or another kernel has just
// written. Kernel ring: no torch.
//
// They are volatile and clobber memory, so the compiler moves none of them across a barrier, an
// mbarrier's wait or griddepcontrol.wait. It may move __ldcg, which is a plain asm. The static
// gates check the compiled code.
#pragma once

#include <cstdint>

namespace sqk {

// Loads from L2, where other multiprocessors' results arrive; L1 may hold older values.
__device__ inline float load_fresh(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];"
               : "=f"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}
__device__ inline int32_t load_fresh(const int32_t* from) {
  int32_t value;
  asm volatile("ld.global.cg.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}
__device__ inline int8_t load_fresh(const int8_t* from) {
  int16_t value;
  asm volatile("ld.global.cg.s8 %0, [%1];"
               : "=h"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return static_cast<int8_t>(value);
}
__device__ inline int4 load_fresh(const int4* from) {
  int4 value;
  asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

// A kernel that was launched to overlap (KernelLaunch::overlap) starts while the kernel before it
// still runs. It must call this before it reads or writes any global memory that another kernel may
// write or read: inputs, but also outputs and workspaces, which may reuse memory of the kernel
// before. At least one thread of every block must call it, even of a kernel that reads nothing
// fresh: otherwise it could end first, and the kernel after it would wait for it alone.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have called this or ended, a kernel that was launched to overlap may start. Only
// after wait_for_previous_kernel: so what such a kernel reads before its own wait was complete
// before this kernel went on. Kernels that were not launched to overlap are not affected.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Release and acquire at GPU scope. It also covers the writes of other threads that a barrier has
// ordered before it.
__device__ inline void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace sqk
