// Weak memory (PTXSIM_WEAK).
#include <algorithm>

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"

namespace ptxsim {
// A CTA's global stores are seen by the CTA at once, by others when
// they are fenced at gpu scope (by the writer, or by a thread that a barrier has ordered behind
// it), or at some time later, in any order.
static void apply_word(u64 a, const WeakWord& x) {
  const u8* v = (const u8*)&x.value;
  for (u32 k = 0; k < 4; k++)
    if ((x.mask >> k) & 1) *(u8*)(a + k) = v[k];
}
void weak_store(Warp& warp, int lane, u64 a, const u8* p, u32 n) {
  for (u32 k = 0; k < n; k++) {
    WeakWord& x = warp.cta->weak[(a + k) & ~3ull];
    u32 b = (u32)(a + k) & 3;
    ((u8*)&x.value)[b] = p[k];
    x.mask |= (u8)(1u << b);
    x.writer = (u32)warp.id * 32 + (u32)lane;
    x.ordered = false;
  }
}
void weak_load(Warp& warp, u64 a, u8* p, u32 n) {
  for (u32 k = 0; k < n; k++) {
    auto it = warp.cta->weak.find((a + k) & ~3ull);
    u32 b = (u32)(a + k) & 3;
    if (it != warp.cta->weak.end() && ((it->second.mask >> b) & 1))
      p[k] = ((const u8*)&it->second.value)[b];
  }
}
void weak_publish(Warp& warp, u64 a, u32 n) {
  for (u64 k = a & ~3ull; k < a + n; k += 4) {
    auto it = warp.cta->weak.find(k);
    if (it != warp.cta->weak.end()) {
      apply_word(k, it->second);
      warp.cta->weak.erase(it);
    }
  }
}
void weak_fence(Warp& warp, u32 lanes) {
  auto& q = warp.cta->weak;
  for (auto it = q.begin(); it != q.end();) {
    u32 wr = it->second.writer;
    if (it->second.ordered || (wr / 32 == (u32)warp.id && ((lanes >> (wr & 31)) & 1))) {
      apply_word(it->first, it->second);
      it = q.erase(it);
    } else
      ++it;
  }
}
void weak_ordered(Warp& warp, u32 lanes) {
  for (auto& kv : warp.cta->weak)
    if (kv.second.writer / 32 == (u32)warp.id && ((lanes >> (kv.second.writer & 31)) & 1))
      kv.second.ordered = true;
}
void weak_apply(const WeakMap& m) {
  for (auto& kv : m) apply_word(kv.first, kv.second);
}
void weak_some(Worker& worker, WeakMap& m) {
  for (auto it = m.begin(); it != m.end();) {
    if (!worker.random(64)) {
      apply_word(it->first, it->second);
      it = m.erase(it);
    } else
      ++it;
  }
}
}  // namespace ptxsim
