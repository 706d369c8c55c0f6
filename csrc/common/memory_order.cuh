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
__device__ inline int4 load_fresh(const int4* from) {
  int4 value;
  asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

// Release and acquire at GPU scope. It also covers the writes of other threads that a barrier has
// ordered before it.
__device__ inline void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace sqk
