// Weak memory (PTXSIM_WEAK): the global stores of a CTA that other CTAs do not see yet.
#pragma once
#include "common.h"

namespace ptxsim {
struct Warp;
struct Worker;

struct WeakWord {
  u32 value = 0;
  u8 mask = 0;           // one bit a byte: stored
  bool ordered = false;  // a barrier orders another thread behind the store
  u32 writer = 0;        // thread of the CTA
};
typedef std::unordered_map<u64, WeakWord> WeakMap;

void weak_store(Warp& warp, int lane, u64 address, const u8* bytes, u32 count);
void weak_load(Warp& warp, u64 address, u8* bytes, u32 count);
// Makes the stores to a range visible to every CTA.
void weak_publish(Warp& warp, u64 address, u32 count);
// A fence of the lanes at gpu scope.
void weak_fence(Warp& warp, u32 lanes);
// A barrier has ordered other threads of the CTA behind the lanes.
void weak_ordered(Warp& warp, u32 lanes);
void weak_apply(const WeakMap& stores);
// Makes a few words visible, at random.
void weak_some(Worker& worker, WeakMap& stores);
}  // namespace ptxsim
