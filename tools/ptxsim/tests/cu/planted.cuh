// Kernels of basic.cu with planted defects, which the simulator must report.
extern "C" int run_oob(const float* a, float* c, int n) {
  k_vadd<<<(n + 255) / 256, 256>>>(a, a, c, n);
  FIN();
}
__global__ void k_misaligned(const char* p, float4* o) { o[threadIdx.x] = *(const float4*)(p + 4); }
extern "C" int run_misaligned(const char* p, float4* o) {
  k_misaligned<<<1, 1>>>(p, o);
  FIN();
}
__global__ void k_smemoob(float* o, int k) {
  __shared__ float s[64];
  s[threadIdx.x + k] = 1.f;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" int run_smemoob(float* o, int k) {
  k_smemoob<<<1, 64>>>(o, k);
  FIN();
}
__global__ void k_dyn(float* o, int n) {
  extern __shared__ float d[];
  d[n - 1 - threadIdx.x] = (float)threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = d[threadIdx.x];
}
extern "C" int run_dyn(float* o, int n, int bytes, int raise) {
  if (raise) {
    cudaError_t e = cudaFuncSetAttribute(k_dyn, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e) {
      cudaGetLastError();
      return e;
    }
  }
  k_dyn<<<1, 64, bytes>>>(o, n);
  FIN();
}
extern "C" int run_uninit_global(float* o) {
  float* p;
  cudaMalloc(&p, 256);
  cudaMemset(p, 0, 128);
  k_vadd<<<1, 64>>>(p, p, o, 64);
  FIN();
}
__global__ void k_uninit_shared(float* o) {
  __shared__ float s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" int run_uninit_shared(float* o) {
  k_uninit_shared<<<1, 64>>>(o);
  FIN();
}
__global__ void k_race(float* o, int sync) {
  __shared__ float s[128];
  s[threadIdx.x] = (float)threadIdx.x;
  if (sync) __syncthreads();
  o[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" int run_race(float* o, int sync) {
  k_race<<<1, 128>>>(o, sync);
  FIN();
}
__global__ void k_deadlock(float* o, int id) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync %0, 64;" ::"r"(id));
  o[threadIdx.x] = 1.f;
}
extern "C" int run_deadlock(float* o, int id) {
  k_deadlock<<<1, 64>>>(o, id);
  FIN();
}
__global__ void k_mbardead(float* o, int arrivals) {
  __shared__ alignas(8) uint64_t bar;
  uint32_t b = (uint32_t)__cvta_generic_to_shared(&bar);
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(b));
  __syncthreads();
  if ((int)threadIdx.x < arrivals)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b));
  asm volatile(
      "{ .reg .pred P; W: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0; @P bra D; bra W; D: "
      "}" ::"r"(b));
  o[threadIdx.x] = 2.f;
}
extern "C" int run_mbardead(float* o, int arrivals) {
  k_mbardead<<<1, 32>>>(o, arrivals);
  FIN();
}
__global__ void k_assert(int v) {
  if (v == 3) {
    printf("value %d %s %.2f\n", v, "str", 1.5);
    asm volatile("trap;");
  }
}
extern "C" int run_trap(int v) {
  k_assert<<<1, 1>>>(v);
  FIN();
}
extern "C" int run_uaf(float* o) {
  float* p;
  cudaMalloc(&p, 256);
  cudaMemset(p, 0, 256);
  cudaFree(p);
  k_vadd<<<1, 64>>>(p, p, o, 64);
  FIN();
}
