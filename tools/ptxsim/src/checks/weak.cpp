// Weak memory (PTXSIM_WEAK).
#include <algorithm>

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"

namespace ptxsim {
// A CTA's global stores are seen by the CTA at once, by others when
// they are fenced at gpu scope (by the writer, or by a thread that a barrier has ordered behind
// it), or at some time later, in any order.
static void apply_word(u64 address, const WeakWord& word) {
  const u8* bytes = (const u8*)&word.value;
  for (u32 k = 0; k < 4; k++)
    if ((word.mask >> k) & 1) *(u8*)(address + k) = bytes[k];
}
void weak_store(Warp& warp, int lane, u64 address, const u8* bytes, u32 count) {
  for (u32 k = 0; k < count; k++) {
    WeakWord& word = warp.cta->weak[(address + k) & ~3ull];
    u32 place = (u32)(address + k) & 3;
    ((u8*)&word.value)[place] = bytes[k];
    word.mask |= (u8)(1u << place);
    word.writer = (u32)warp.id * 32 + (u32)lane;
    word.ordered = false;
  }
}
void weak_load(Warp& warp, u64 address, u8* bytes, u32 count) {
  for (u32 k = 0; k < count; k++) {
    auto found = warp.cta->weak.find((address + k) & ~3ull);
    u32 place = (u32)(address + k) & 3;
    if (found != warp.cta->weak.end() && ((found->second.mask >> place) & 1))
      bytes[k] = ((const u8*)&found->second.value)[place];
  }
}
void weak_publish(Warp& warp, u64 address, u32 count) {
  for (u64 word = address & ~3ull; word < address + count; word += 4) {
    auto found = warp.cta->weak.find(word);
    if (found != warp.cta->weak.end()) {
      apply_word(word, found->second);
      warp.cta->weak.erase(found);
    }
  }
}
void weak_fence(Warp& warp, u32 lanes) {
  auto& stores = warp.cta->weak;
  for (auto it = stores.begin(); it != stores.end();) {
    u32 writer = it->second.writer;
    if (it->second.ordered || (writer / 32 == (u32)warp.id && ((lanes >> (writer & 31)) & 1))) {
      apply_word(it->first, it->second);
      it = stores.erase(it);
    } else
      ++it;
  }
}
void weak_ordered(Warp& warp, u32 lanes) {
  for (auto& store : warp.cta->weak)
    if (store.second.writer / 32 == (u32)warp.id && ((lanes >> (store.second.writer & 31)) & 1))
      store.second.ordered = true;
}
void weak_apply(const WeakMap& stores) {
  for (auto& store : stores) apply_word(store.first, store.second);
}
void weak_some(Worker& worker, WeakMap& stores) {
  for (auto it = stores.begin(); it != stores.end();) {
    if (!worker.random(64)) {
      apply_word(it->first, it->second);
      it = stores.erase(it);
    } else
      ++it;
  }
}
}  // namespace ptxsim
