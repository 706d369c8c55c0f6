#include "checks/overlap.h"

#include <deque>

namespace ptxsim {
namespace {
struct Byte {
  u64 address;
  u8 before, after;
};
// The bytes of an allocation that a launch has changed.
struct Changed {
  u64 id, base;
  std::vector<Byte> bytes;
};
struct Written {
  std::vector<Changed> allocations;
  bool triggered_early = false;
};

constexpr size_t kKept = 8;
std::deque<Written> g_written;  // of the last launches, newest last

// Whether the allocation is the same, and the host has not written to these bytes since.
bool is_intact(const Launch& launch, const Changed& changed) {
  const Allocation* allocation = launch.allocations->find(changed.base);
  if (!allocation || allocation->id != changed.id) return false;
  for (auto& byte : changed.bytes)
    if (*(const u8*)byte.address != byte.after) return false;
  return true;
}
}  // namespace

EarlierMemory::EarlierMemory(const Launch& launch) {
  for (size_t i = g_written.size(); i-- > 0;) {
    for (auto& changed : g_written[i].allocations) {
      if (!is_intact(launch, changed)) continue;
      for (auto& byte : changed.bytes) {
        now_.push_back({(u8*)byte.address, byte.after});
        *(u8*)byte.address = byte.before;
      }
    }
    if (!g_written[i].triggered_early) break;
  }
}

EarlierMemory::~EarlierMemory() {
  for (size_t i = now_.size(); i-- > 0;) *now_[i].to = now_[i].value;
}

WatchedMemory::WatchedMemory(const Launch& launch) : launch_(launch) {
  if (!options().overlap) return;
  for (auto& allocation : launch.allocations->allocations) {
    auto* begin = (const u8*)allocation.base;
    before_.emplace_back(begin, begin + (allocation.read_only ? 0 : allocation.size));
  }
}

void WatchedMemory::remember() {
  if (!options().overlap) return;
  Written written;
  // A kernel that was not launched to overlap has nothing to wait for.
  written.triggered_early = launch_.params.overlap && launch_.triggered_early;
  for (size_t i = 0; i < before_.size(); i++) {
    const Allocation& allocation = launch_.allocations->allocations[i];
    auto* now = (const u8*)allocation.base;
    if (before_[i].empty() || !memcmp(now, before_[i].data(), before_[i].size())) continue;
    Changed changed{allocation.id, allocation.base, {}};
    for (size_t k = 0; k < before_[i].size(); k++)
      if (now[k] != before_[i][k])
        changed.bytes.push_back({allocation.base + k, before_[i][k], now[k]});
    written.allocations.push_back(std::move(changed));
  }
  g_written.push_back(std::move(written));
  if (g_written.size() > kKept) g_written.pop_front();
}

void forget_kernels() { g_written.clear(); }

void check_waited(const Cluster& cluster) {
  if (!starts_early(*cluster.launch)) return;
  for (auto& cta : cluster.ctas)
    if (!cta.grid_waited)
      throw SimError(kErrorCheck,
                     format("block (%u,%u,%u) of a dependent launch ended without "
                            "griddepcontrol.wait: kernels after it may start before the kernel "
                            "before it has ended (PTXSIM_OVERLAP)",
                            cta.id[0], cta.id[1], cta.id[2]));
}
}  // namespace ptxsim
