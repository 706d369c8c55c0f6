// Coalescing and bank conflicts of one request of a warp.
#include <algorithm>

#include "checks.h"
#include "exec.h"
#include "instructions/access.h"

namespace ptxsim {
void count_global(Warp& warp, const u64* addresses, u32 lanes, u32 size, bool store) {
  u64 sectors[160];
  int count = 0;
  for_each_lane(lanes, [&](int lane) {
    for (u64 sector = addresses[lane] >> 5; sector <= (addresses[lane] + size - 1) >> 5; sector++) {
      if (count < 160 && (count == 0 || sectors[count - 1] != sector)) {
        bool seen = false;
        for (int i = 0; i < count; i++) seen |= sectors[i] == sector;
        if (!seen) sectors[count++] = sector;
      }
    }
  });
  u64 bytes = (u64)size * (u64)__builtin_popcount(lanes);
  Stats& stats = warp.worker->stats;
  if (store) {
    stats.store_bytes += bytes;
    stats.store_sectors += (u64)count;
    stats.store_requests++;
    stats.store_ideal_sectors += (bytes + 31) / 32;
  } else {
    stats.load_bytes += bytes;
    stats.load_sectors += (u64)count;
    stats.load_requests++;
    stats.load_ideal_sectors += (bytes + 31) / 32;
  }
}
void count_shared(Warp& warp, const u64* addresses, u32 lanes, u32 bytes) {
  u32 lanes_at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  Stats& stats = warp.worker->stats;
  stats.shared_requests++;
  for (u32 first = 0; first < 32; first += lanes_at_once) {
    u32 part = lanes & (lanes_at_once == 32 ? kFullMask : ((1u << lanes_at_once) - 1) << first);
    if (!part) continue;
    u32 words[32][33];
    u8 count[32] = {};
    u32 most = 1;
    for_each_lane(part, [&](int lane) {
      for (u32 offset = 0; offset < (bytes < 4 ? 4 : bytes); offset += 4) {
        u32 word = (u32)(addresses[lane] + offset) >> 2;
        u32 bank = word & 31;
        bool seen = false;
        for (u32 i = 0; i < count[bank]; i++) seen |= words[bank][i] == word;
        if (!seen) {
          words[bank][count[bank]++] = word;
          if (count[bank] > most) most = count[bank];
        }
      }
    });
    stats.shared_wavefronts += most;
    stats.shared_ideal_wavefronts++;
  }
}
void count_shared_request(Warp& warp, const u64* addresses, u32 lanes, u32 bytes) {
  count_shared(warp, addresses, lanes, bytes);
}
void count_memory(Warp& warp, const Instruction& instruction, Space space, const u64* addresses,
                  u32 lanes, u32 bytes, bool store) {
  if (!lanes) return;
  int lane = __builtin_ctz(lanes);
  if (space == kGlobal ||
      (space == kGeneric && !in_shared(addresses[lane]) && !in_local(addresses[lane])))
    count_global(warp, addresses, lanes, bytes, store);
  else if (space == kShared || (space == kGeneric && in_shared(addresses[lane])))
    count_shared(warp, addresses, lanes, bytes);
}

}  // namespace ptxsim
