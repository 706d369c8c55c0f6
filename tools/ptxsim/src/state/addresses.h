// Generic addresses, and the checked way from an address to memory of the host.
#pragma once
#include "state/cluster.h"

namespace ptxsim {
// Generic addresses of shared memory hold (rank + 1) << 24 | offset.
constexpr u64 kSharedWin = 0x0001000000000000ull << 8;
constexpr u64 kLocalWin = 0x0001000000000000ull << 9;
inline bool in_shared(u64 address) { return (address >> 32) == (kSharedWin >> 32); }
inline bool in_local(u64 address) { return (address >> 32) == (kLocalWin >> 32); }

enum Access : u8 { kRead = 1, kWrite = 2, kAtomic = 3 };
u8* global_pointer(Warp& warp, int lane, u64 address, u32 bytes, Access access);
// Takes an address in the window of shared memory, which may carry a rank.
u8* shared_pointer(Warp& warp, int lane, u64 address, u32 bytes, Access access, u32 align = 0);
u8* resolve(Warp& warp, int lane, Space space, u64 address, u32 bytes, Access access);
// The address in the window of shared memory of a .shared or a generic address.
u32 shared_address(Warp& warp, int lane, Space space, u64 address);
// The CTA in whose shared memory an address lies.
Cta* cta_of(Warp& warp, int lane, u32 shared_address);
}  // namespace ptxsim
