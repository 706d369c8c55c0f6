// Where an address points, and whether the access is allowed.

#include "instructions/access.h"

#include "checks.h"
#include "checks/overlap.h"
#include "exec.h"

namespace ptxsim {
static const char* space_name(Space space) {
  static const char* names[] = {"generic", "global", "shared", "local", "param", "const"};
  return names[space];
}

static u8* global_slow(Warp& warp, int lane, u64 address, u32 bytes, Access access) {
  Launch& launch = *warp.launch;
  if (address >= launch.param_base && address + bytes <= launch.param_base + launch.param_size) {
    if (access & kWrite) warp.fail(kErrorAddress, lane, "store to kernel parameter space");
    return (u8*)address;
  }
  const Allocation* allocation = launch.allocations->find(address);
  if (!allocation || address - allocation->base >= allocation->size ||
      address - allocation->base + bytes > allocation->size ||
      ((access & kWrite) && allocation->read_only))
    warp.fail(kErrorAddress, lane,
              format("out-of-bounds global %s of %u bytes at address 0x%llx\n    %s",
                     access == kRead    ? "load"
                     : access == kWrite ? "store"
                                        : "atomic",
                     bytes, (unsigned long long)address, memory_describe(address).c_str()));
  warp.worker->last_allocation = allocation;
  warp.worker->cached_begin = allocation->base;
  warp.worker->cached_size = allocation->read_only ? 0 : allocation->size;
  return (u8*)address;
}
void misaligned(Warp& warp, int lane, Space space, u64 address, u32 bytes) {
  warp.fail(kErrorMisaligned, lane,
            format("misaligned %s access of %u bytes at address 0x%llx", space_name(space), bytes,
                   (unsigned long long)address));
}
static void global_init(Warp& warp, int lane, u64 address, u32 bytes, Access access) {
  const Allocation* allocation = warp.worker->last_allocation;
  if (!allocation || address - allocation->base >= allocation->size)
    allocation = warp.launch->allocations->find(address);
  if (!allocation || !allocation->init || address - allocation->base >= allocation->size) return;
  u8* states = allocation->init + (address - allocation->base);
  if (access == kAtomic)
    for (u32 k = 0; k < bytes; k++)
      if (!states[k])
        warp.fail(
            kErrorCheck, lane,
            format("read of uninitialized global memory at 0x%llx (%u-byte access, byte %u; %llu "
                   "bytes into %s allocation #%llu)",
                   (unsigned long long)(address + k), bytes, k,
                   (unsigned long long)(address + k - allocation->base), allocation->kind,
                   (unsigned long long)allocation->id));
  if (access & kWrite) memset(states, 1, bytes);
}
u8* global_pointer(Warp& warp, int lane, u64 address, u32 bytes, Access access) {
  if (__builtin_expect(warp.launch->holding && (access & kWrite), 0))
    warp.fail(
        kErrorCheck, lane,
        format("global %s of %u bytes before griddepcontrol.wait, while the kernel before may "
               "still use the memory (PTXSIM_OVERLAP)",
               access == kWrite ? "store" : "atomic", bytes));
  if (address & (bytes - 1))
    if ((bytes & (bytes - 1)) == 0) misaligned(warp, lane, kGlobal, address, bytes);
  u64 offset = address - warp.worker->cached_begin;
  if (__builtin_expect(
          offset >= warp.worker->cached_size || offset + bytes > warp.worker->cached_size, 0))
    global_slow(warp, lane, address, bytes, access);
  if (__builtin_expect(warp.launch->check_init, 0)) global_init(warp, lane, address, bytes, access);
  if (__builtin_expect(options().overlap && (access & kWrite), 0))
    note_written(*warp.launch, address, bytes);
  return (u8*)address;
}

Cta* cta_of(Warp& warp, int lane, u32 address) {
  u32 rank_plus_one = address >> 24;
  if (rank_plus_one == 0 || rank_plus_one == warp.cta->rank + 1) return warp.cta;
  if (rank_plus_one > warp.cta->cluster->ctas.size())
    warp.fail(kErrorAddress, lane,
              format("shared::cluster address 0x%x names CTA rank %u of a cluster of %zu", address,
                     rank_plus_one - 1, warp.cta->cluster->ctas.size()));
  Cta* cta = &warp.cta->cluster->ctas[rank_plus_one - 1];
  if (cta->done)
    warp.fail(
        kErrorAddress, lane,
        format("access to the shared memory of CTA rank %u, which has already exited (a cluster "
               "barrier is missing at the end)",
               rank_plus_one - 1));
  return cta;
}
static std::string shared_describe(Warp& warp, u32 offset) {
  const Kernel& kernel = *warp.launch->kernel;
  std::string text =
      format("CTA has %u bytes: %u static + %u dynamic, addresses 0x%x..0x%x",
             warp.cta->shared_end - warp.cta->shared_begin, kernel.static_shared,
             warp.launch->params.dynamic_shared, warp.cta->shared_begin, warp.cta->shared_end);
  for (auto& variable : kernel.shared_variables) {
    if (offset >= variable.offset && offset < variable.offset + variable.size)
      text += format("; inside variable %s+%u", variable.name.c_str(), offset - variable.offset);
    else if (offset >= variable.offset + variable.size &&
             offset < variable.offset + variable.size + 64)
      text +=
          format("; %u bytes past the end of variable %s[%u]",
                 offset - variable.offset - variable.size, variable.name.c_str(), variable.size);
  }
  return text;
}
u8* shared_pointer(Warp& warp, int lane, u64 address64, u32 bytes, Access access, u32 align) {
  u32 address = (u32)address64, offset = address & 0xffffff;
  Cta* cta = (address >> 24) ? cta_of(warp, lane, address) : warp.cta;
  u32 alignment = align ? align : bytes;
  if ((offset & (alignment - 1)) && (alignment & (alignment - 1)) == 0)
    misaligned(warp, lane, kShared, address, alignment);
  if (__builtin_expect(offset < cta->shared_begin || offset + bytes > cta->shared_end, 0))
    warp.fail(kErrorAddress, lane,
              format("out-of-bounds shared %s of %u bytes at shared address 0x%x\n    %s",
                     access == kRead    ? "load"
                     : access == kWrite ? "store"
                                        : "atomic",
                     bytes, address, shared_describe(warp, offset).c_str()));
  if (__builtin_expect(cta->shadow != nullptr, 0)) {
    if (warp.launch->check_init) {
      if (access == kAtomic) init_read(warp, lane, *cta, offset, bytes);
      if (access & kWrite) init_write(*cta, offset, bytes);
    }
    if (warp.launch->check_race && access != kAtomic)
      race_access(warp, lane, *cta, offset, bytes, access & kWrite, false);
  }
  return cta->shared + offset;
}
u8* local_pointer(Warp& warp, int lane, u64 address, u32 bytes) {
  u32 offset = (u32)address;
  if (offset & (bytes - 1)) misaligned(warp, lane, kLocal, offset, bytes);
  if (offset + (u64)bytes > warp.launch->kernel->local_bytes)
    warp.fail(
        kErrorAddress, lane,
        format("out-of-bounds local access of %u bytes at local address 0x%x (frame of %u bytes)",
               bytes, offset, warp.launch->kernel->local_bytes));
  return warp.local + (size_t)lane * warp.launch->kernel->local_bytes + offset;
}
u8* resolve(Warp& warp, int lane, Space space, u64 address, u32 bytes, Access access) {
  switch (space) {
    case kGlobal:
    case kConst:
      return global_pointer(warp, lane, address, bytes, access);
    case kShared:
      return shared_pointer(warp, lane, address, bytes, access);
    case kLocal:
      return local_pointer(warp, lane, address, bytes);
    case kParam:
      if (address & 0x80000000u) return local_pointer(warp, lane, address & 0x7fffffffu, bytes);
      if (address >= warp.launch->param_base &&
          address + bytes <= warp.launch->param_base + warp.launch->param_size)
        return (u8*)address;
      if (address & (bytes - 1)) misaligned(warp, lane, space, address, bytes);
      if (address + bytes > warp.launch->param_size)
        warp.fail(kErrorAddress, lane,
                  format("out-of-bounds parameter access at offset %llu of %llu",
                         (unsigned long long)address, (unsigned long long)warp.launch->param_size));
      return (u8*)(warp.launch->param_base + address);
    default:
      if (in_shared(address)) return shared_pointer(warp, lane, (u32)address, bytes, access);
      if (in_local(address)) return local_pointer(warp, lane, (u32)address, bytes);
      return global_pointer(warp, lane, address, bytes, access);
  }
}
u32 shared_address(Warp& warp, int lane, Space space, u64 address) {
  if (space == kShared) return (u32)address;
  if (!in_shared(address))
    warp.fail(
        kErrorAddress, lane,
        format("generic address 0x%llx is not in shared memory", (unsigned long long)address));
  return (u32)address;
}

}  // namespace ptxsim
