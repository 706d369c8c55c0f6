// Where an address points, and whether the access is allowed.

#include "instructions/access.h"

#include "checks.h"
#include "exec.h"

namespace ptxsim {
static const char* space_name(Space s) {
  static const char* n[] = {"generic", "global", "shared", "local", "param", "const"};
  return n[s];
}

static u8* global_slow(Warp& warp, int lane, u64 addr, u32 n, Access access) {
  Launch& launch = *warp.launch;
  if (addr >= launch.param_base && addr + n <= launch.param_base + launch.param_size) {
    if (access & kWrite) warp.fail(kErrorAddress, lane, "store to kernel parameter space");
    return (u8*)addr;
  }
  const Allocation* allocation = launch.allocations->find(addr);
  if (!allocation || addr - allocation->base >= allocation->size ||
      addr - allocation->base + n > allocation->size ||
      ((access & kWrite) && allocation->read_only))
    warp.fail(kErrorAddress, lane,
              format("out-of-bounds global %s of %u bytes at address 0x%llx\n    %s",
                     access == kRead    ? "load"
                     : access == kWrite ? "store"
                                        : "atomic",
                     n, (unsigned long long)addr, memory_describe(addr).c_str()));
  warp.worker->last_allocation = allocation;
  warp.worker->cached_begin = allocation->base;
  warp.worker->cached_size = allocation->read_only ? 0 : allocation->size;
  return (u8*)addr;
}
void misaligned(Warp& warp, int lane, Space space, u64 addr, u32 n) {
  warp.fail(kErrorMisaligned, lane,
            format("misaligned %s access of %u bytes at address 0x%llx", space_name(space), n,
                   (unsigned long long)addr));
}
static void global_init(Warp& warp, int lane, u64 addr, u32 n, Access access) {
  const Allocation* allocation = warp.worker->last_allocation;
  if (!allocation || addr - allocation->base >= allocation->size)
    allocation = warp.launch->allocations->find(addr);
  if (!allocation || !allocation->init || addr - allocation->base >= allocation->size) return;
  u8* s = allocation->init + (addr - allocation->base);
  if (access == kAtomic)
    for (u32 k = 0; k < n; k++)
      if (!s[k])
        warp.fail(
            kErrorCheck, lane,
            format("read of uninitialized global memory at 0x%llx (%u-byte access, byte %u; %llu "
                   "bytes into %s allocation #%llu)",
                   (unsigned long long)(addr + k), n, k,
                   (unsigned long long)(addr + k - allocation->base), allocation->kind,
                   (unsigned long long)allocation->id));
  if (access & kWrite) memset(s, 1, n);
}
u8* global_pointer(Warp& warp, int lane, u64 addr, u32 n, Access access) {
  if (addr & (n - 1))
    if ((n & (n - 1)) == 0) misaligned(warp, lane, kGlobal, addr, n);
  u64 o = addr - warp.worker->cached_begin;
  if (__builtin_expect(o >= warp.worker->cached_size || o + n > warp.worker->cached_size, 0))
    global_slow(warp, lane, addr, n, access);
  if (__builtin_expect(warp.launch->check_init, 0)) global_init(warp, lane, addr, n, access);
  return (u8*)addr;
}

Cta* cta_of(Warp& warp, int lane, u32 a) {
  u32 r = a >> 24;
  if (r == 0 || r == warp.cta->rank + 1) return warp.cta;
  if (r > warp.cta->cluster->ctas.size())
    warp.fail(kErrorAddress, lane,
              format("shared::cluster address 0x%x names CTA rank %u of a cluster of %zu", a, r - 1,
                     warp.cta->cluster->ctas.size()));
  Cta* cta = &warp.cta->cluster->ctas[r - 1];
  if (cta->done)
    warp.fail(
        kErrorAddress, lane,
        format("access to the shared memory of CTA rank %u, which has already exited (a cluster "
               "barrier is missing at the end)",
               r - 1));
  return cta;
}
static std::string shared_describe(Warp& warp, u32 off) {
  const Kernel& kernel = *warp.launch->kernel;
  std::string s =
      format("CTA has %u bytes: %u static + %u dynamic, addresses 0x%x..0x%x",
             warp.cta->shared_end - warp.cta->shared_begin, kernel.static_shared,
             warp.launch->params.dynamic_shared, warp.cta->shared_begin, warp.cta->shared_end);
  for (auto& v : kernel.shared_variables) {
    if (off >= v.offset && off < v.offset + v.size)
      s += format("; inside variable %s+%u", v.name.c_str(), off - v.offset);
    else if (off >= v.offset + v.size && off < v.offset + v.size + 64)
      s += format("; %u bytes past the end of variable %s[%u]", off - v.offset - v.size,
                  v.name.c_str(), v.size);
  }
  return s;
}
u8* shared_pointer(Warp& warp, int lane, u64 addr, u32 n, Access access, u32 align) {
  u32 a = (u32)addr, off = a & 0xffffff;
  Cta* cta = (a >> 24) ? cta_of(warp, lane, a) : warp.cta;
  u32 al = align ? align : n;
  if ((off & (al - 1)) && (al & (al - 1)) == 0) misaligned(warp, lane, kShared, a, al);
  if (__builtin_expect(off < cta->shared_begin || off + n > cta->shared_end, 0))
    warp.fail(kErrorAddress, lane,
              format("out-of-bounds shared %s of %u bytes at shared address 0x%x\n    %s",
                     access == kRead    ? "load"
                     : access == kWrite ? "store"
                                        : "atomic",
                     n, a, shared_describe(warp, off).c_str()));
  if (__builtin_expect(cta->shadow != nullptr, 0)) {
    if (warp.launch->check_init) {
      if (access == kAtomic) init_read(warp, lane, *cta, off, n);
      if (access & kWrite) init_write(*cta, off, n);
    }
    if (warp.launch->check_race && access != kAtomic)
      race_access(warp, lane, *cta, off, n, access & kWrite, false);
  }
  return cta->shared + off;
}
u8* local_pointer(Warp& warp, int lane, u64 addr, u32 n) {
  u32 off = (u32)addr;
  if (off & (n - 1)) misaligned(warp, lane, kLocal, off, n);
  if (off + (u64)n > warp.launch->kernel->local_bytes)
    warp.fail(
        kErrorAddress, lane,
        format("out-of-bounds local access of %u bytes at local address 0x%x (frame of %u bytes)",
               n, off, warp.launch->kernel->local_bytes));
  return warp.local + (size_t)lane * warp.launch->kernel->local_bytes + off;
}
u8* resolve(Warp& warp, int lane, Space space, u64 a, u32 n, Access access) {
  switch (space) {
    case kGlobal:
    case kConst:
      return global_pointer(warp, lane, a, n, access);
    case kShared:
      return shared_pointer(warp, lane, a, n, access);
    case kLocal:
      return local_pointer(warp, lane, a, n);
    case kParam:
      if (a & 0x80000000u) return local_pointer(warp, lane, a & 0x7fffffffu, n);
      if (a >= warp.launch->param_base &&
          a + n <= warp.launch->param_base + warp.launch->param_size)
        return (u8*)a;
      if (a & (n - 1)) misaligned(warp, lane, space, a, n);
      if (a + n > warp.launch->param_size)
        warp.fail(kErrorAddress, lane,
                  format("out-of-bounds parameter access at offset %llu of %llu",
                         (unsigned long long)a, (unsigned long long)warp.launch->param_size));
      return (u8*)(warp.launch->param_base + a);
    default:
      if (in_shared(a)) return shared_pointer(warp, lane, (u32)a, n, access);
      if (in_local(a)) return local_pointer(warp, lane, (u32)a, n);
      return global_pointer(warp, lane, a, n, access);
  }
}
u32 shared_address(Warp& warp, int lane, Space space, u64 a) {
  if (space == kShared) return (u32)a;
  if (!in_shared(a))
    warp.fail(kErrorAddress, lane,
              format("generic address 0x%llx is not in shared memory", (unsigned long long)a));
  return (u32)a;
}

}  // namespace ptxsim
