// Loads and fences whose place among others matters: what another block or another kernel has
// written meanwhile. Kernel ring: no torch.
//
// Volatile, and with a clobber of memory, so that the compiler moves none of them over a barrier,
// an mbarrier's wait or griddepcontrol.wait; of __ldcg, a plain asm, it may. tools/gates
// checks the compiled code.
#pragma once

#include <cstdint>

namespace sqk {

// From L2, where other multiprocessors' results arrive.
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

// Release and acquire for all of the GPU. What a barrier has put before it counts as this thread's
// own.
__device__ inline void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace sqk
