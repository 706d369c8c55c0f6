// Coalescing and bank conflicts of one request of a warp.
#include <algorithm>

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"

namespace ptxsim {
void count_global(Warp& warp, const u64* a, u32 lanes, u32 n, bool st) {
  u64 sec[160];
  int k = 0;
  for_each_lane(lanes, [&](int lane) {
    for (u64 s = a[lane] >> 5; s <= (a[lane] + n - 1) >> 5; s++) {
      if (k < 160 && (k == 0 || sec[k - 1] != s)) {
        bool f = false;
        for (int q = 0; q < k; q++) f |= sec[q] == s;
        if (!f) sec[k++] = s;
      }
    }
  });
  u64 bytes = (u64)n * (u64)__builtin_popcount(lanes);
  Stats& S = warp.worker->stats;
  if (st) {
    S.store_bytes += bytes;
    S.store_sectors += (u64)k;
    S.store_requests++;
    S.store_ideal_sectors += (bytes + 31) / 32;
  } else {
    S.load_bytes += bytes;
    S.load_sectors += (u64)k;
    S.load_requests++;
    S.load_ideal_sectors += (bytes + 31) / 32;
  }
}
void count_shared(Warp& warp, const u64* a, u32 lanes, u32 n) {
  u32 per = n <= 4 ? 32 : n == 8 ? 16 : 8;
  Stats& S = warp.worker->stats;
  S.shared_requests++;
  for (u32 p = 0; p < 32; p += per) {
    u32 mm = lanes & (per == 32 ? kFullMask : ((1u << per) - 1) << p);
    if (!mm) continue;
    u32 words[32][33];
    u8 cnt[32] = {};
    u32 mx = 1;
    for_each_lane(mm, [&](int lane) {
      for (u32 b = 0; b < (n < 4 ? 4 : n); b += 4) {
        u32 word = (u32)(a[lane] + b) >> 2;
        u32 bank = word & 31;
        bool f = false;
        for (u32 q = 0; q < cnt[bank]; q++) f |= words[bank][q] == word;
        if (!f) {
          words[bank][cnt[bank]++] = word;
          if (cnt[bank] > mx) mx = cnt[bank];
        }
      }
    });
    S.shared_wavefronts += mx;
    S.shared_ideal_wavefronts++;
  }
}
void count_shared_request(Warp& warp, const u64* a, u32 lanes, u32 n) {
  count_shared(warp, a, lanes, n);
}
void count_memory(Warp& warp, const Instruction& instruction, Space space, const u64* a, u32 lanes,
                  u32 n, bool st) {
  if (!lanes) return;
  int l = __builtin_ctz(lanes);
  if (space == kGlobal || (space == kGeneric && !in_shared(a[l]) && !in_local(a[l])))
    count_global(warp, a, lanes, n, st);
  else if (space == kShared || (space == kGeneric && in_shared(a[l])))
    count_shared(warp, a, lanes, n);
}

}  // namespace ptxsim
