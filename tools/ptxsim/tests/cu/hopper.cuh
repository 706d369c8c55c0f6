// Kernels of basic.cu for Hopper: clusters, bulk and tensor copies, wgmma.
// ---- thread block cluster with distributed shared memory
__global__ void k_dsmem(int* out) {
#ifdef SM90
  __shared__ int s[32];
  cg::cluster_group c = cg::this_cluster();
  s[threadIdx.x] = (int)(blockIdx.x * 100 + threadIdx.x);
  c.sync();
  int* r = c.map_shared_rank(s, (c.block_rank() + 1) % 4);
  out[blockIdx.x * 32 + threadIdx.x] = r[31 - threadIdx.x];
  c.sync();
#endif
}
extern "C" int run_dsmem(int* out) {
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = dim3(8);
  cfg.blockDim = dim3(32);
  cudaLaunchAttribute at[1];
  at[0].id = cudaLaunchAttributeClusterDimension;
  at[0].val.clusterDim.x = 4;
  at[0].val.clusterDim.y = 1;
  at[0].val.clusterDim.z = 1;
  cfg.attrs = at;
  cfg.numAttrs = 1;
  cudaError_t e = cudaLaunchKernelEx(&cfg, k_dsmem, out);
  if (e) return e;
  FIN();
}

// ---- 1-D bulk copy in, st.shared, bulk copy out
__global__ void k_bulk(const float* x, float* y, int n) {
#ifdef SM90
  __shared__ alignas(128) float s[256];
  __shared__ alignas(8) uint64_t bar;
  uint32_t b = (uint32_t)__cvta_generic_to_shared(&bar), sp = (uint32_t)__cvta_generic_to_shared(s);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b));
    asm volatile("fence.proxy.async.shared::cta;");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(1024));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(sp),
        "l"(x), "r"(1024), "r"(b)
        : "memory");
  }
  __syncthreads();
  asm volatile(
      "{ .reg .pred P; W: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0; @P bra D; bra W; D: "
      "}" ::"r"(b)
      : "memory");
  s[threadIdx.x] *= 3.f;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(y), "r"(sp),
                 "r"(1024)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
#endif
}
extern "C" int run_bulk(const float* x, float* y) {
  k_bulk<<<1, 256>>>(x, y, 256);
  FIN();
}

// ---- bf16 wgmma m64n16k16: SS (no swizzle, K-major) and RS
__global__ void k_wgmma(const __nv_bfloat16* A, const __nv_bfloat16* B, float* D, int rs) {
#ifdef SM90
  __shared__ alignas(1024) __nv_bfloat16 sa[64 * 16], sb[16 * 16];
  int t = threadIdx.x, w = t / 32, l = t % 32, g = l / 4, q = l % 4;
  // core matrices of 8 rows x 16 bytes: [k chunk][row group][8 rows][8 elements]
  for (int e = t; e < 64 * 16; e += 128) {
    int r = e / 16, k = e % 16;
    sa[(k / 8) * 512 + (r / 8) * 64 + (r % 8) * 8 + k % 8] = A[e];
  }
  for (int e = t; e < 16 * 16; e += 128) {
    int r = e / 16, k = e % 16;
    sb[(k / 8) * 128 + (r / 8) * 64 + (r % 8) * 8 + k % 8] = B[e];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t da = (((uint32_t)__cvta_generic_to_shared(sa) >> 4) & 0x3fff) |
                ((uint64_t)(1024 >> 4) << 16) | ((uint64_t)(128 >> 4) << 32);
  uint64_t db = (((uint32_t)__cvta_generic_to_shared(sb) >> 4) & 0x3fff) |
                ((uint64_t)(256 >> 4) << 16) | ((uint64_t)(128 >> 4) << 32);
  float d[8] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  if (!rs)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %10, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, "
        "p, 1, 1, 0, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "l"(da), "l"(db), "r"(0));
  else {
    uint32_t a[4];
    auto ld = [&](int r, int k) { return *(const uint32_t*)(A + (w * 16 + r) * 16 + k); };
    a[0] = ld(g, q * 2);
    a[1] = ld(g + 8, q * 2);
    a[2] = ld(g, q * 2 + 8);
    a[3] = ld(g + 8, q * 2 + 8);
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, p, 1, -1, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(1));
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++)
      D[(w * 16 + g + 8 * (e / 2)) * 16 + j * 8 + q * 2 + (e & 1)] = d[j * 4 + e];
#endif
}
extern "C" int run_wgmma(const void* A, const void* B, float* D, int rs) {
  k_wgmma<<<1, 128>>>((const __nv_bfloat16*)A, (const __nv_bfloat16*)B, D, rs);
  FIN();
}

// ---- 2-D TMA: load a box (any swizzle, out-of-bounds parts filled), show the raw shared bytes,
// store or reduce-add it elsewhere
__global__ void k_tma(const __grid_constant__ CUtensorMap in,
                      const __grid_constant__ CUtensorMap out, int x, int y, int x2, int y2,
                      uint8_t* raw, int bytes, int red, int bug) {
#ifdef SM90
  __shared__ alignas(1024) uint8_t s[16384];
  __shared__ alignas(8) uint64_t bar;
  uint32_t b = (uint32_t)__cvta_generic_to_shared(&bar), sp = (uint32_t)__cvta_generic_to_shared(s);
  if (threadIdx.x == 0) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(b));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b),
                 "r"(bug == 2 ? bytes + 16 : bytes));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%2, %3}], [%4];" ::"r"(sp),
        "l"(&in), "r"(x), "r"(y), "r"(b)
        : "memory");
  }
  __syncthreads();
  if (bug != 1)
    asm volatile(
        "{ .reg .pred P; W: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0; @P bra D; bra W; "
        "D: }" ::"r"(b)
        : "memory");
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = s[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (red)
      asm volatile(
          "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], "
          "[%3];" ::"l"(&out),
          "r"(x2), "r"(y2), "r"(sp)
          : "memory");
    else
      asm volatile(
          "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&out),
          "r"(x2), "r"(y2), "r"(sp)
          : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }
#endif
}
extern "C" int run_tma(void* in, void* out, int type, int esize, int w, int h, int bw, int bh,
                       int swz, int x, int y, int x2, int y2, uint8_t* raw, int red, int bug) {
  typedef CUresult (*Enc)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                          const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                          CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                          CUtensorMapFloatOOBfill);
  void* f = nullptr;
  cudaDriverEntryPointQueryResult q;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                       &q) ||
      !f)
    return -1;
  CUtensorMap a, b;
  cuuint64_t dim[2] = {(cuuint64_t)w, (cuuint64_t)h}, str[1] = {(cuuint64_t)w * esize};
  cuuint32_t box[2] = {(cuuint32_t)bw, (cuuint32_t)bh}, es[2] = {1, 1};
  for (int k = 0; k < 2; k++)
    if (((Enc)f)(k ? &b : &a, (CUtensorMapDataType)type, 2, k ? out : in, dim, str, box, es,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)swz,
                 CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
      return -2;
  k_tma<<<1, 64>>>(a, b, x, y, x2, y2, raw, bw * bh * esize, red, bug);
  FIN();
}

// ---- wgmma whose operand is overwritten before the wait
__global__ void k_wgmma_overwrite(float* D, int bug) {
#ifdef SM90
  __shared__ alignas(1024) uint32_t sa[512], sb[128];
  for (int i = threadIdx.x; i < 512; i += 128) sa[i] = 0x3f803f80;
  sb[threadIdx.x] = 0x3f803f80;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint64_t da = (((uint32_t)__cvta_generic_to_shared(sa) >> 4) & 0x3fff) |
                ((uint64_t)(1024 >> 4) << 16) | ((uint64_t)(128 >> 4) << 32);
  uint64_t db = (((uint32_t)__cvta_generic_to_shared(sb) >> 4) & 0x3fff) |
                ((uint64_t)(256 >> 4) << 16) | ((uint64_t)(128 >> 4) << 32);
  float d[8] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, 0, 0; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "l"(da), "l"(db), "r"(0));
  asm volatile("wgmma.commit_group.sync.aligned;");
  __syncthreads();
  if (bug) sb[threadIdx.x] = 0;
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int j = 0; j < 8; j++) D[threadIdx.x * 8 + j] = d[j];
#endif
}
extern "C" int run_wgmma_overwrite(float* D, int bug) {
  k_wgmma_overwrite<<<1, 128>>>(D, bug);
  FIN();
}
