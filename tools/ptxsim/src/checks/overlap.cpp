#include "checks/overlap.h"

#include <deque>

namespace ptxsim {
namespace {
struct Byte {
  u64 address;
  u8 before, after;
};
// The bytes of an allocation that a launch has written.
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

void note_written(Launch& launch, u64 address, u32 bytes) {
  std::lock_guard<std::mutex> lock(launch.mutex);
  for (u32 k = 0; k < bytes; k++)
    launch.written.try_emplace(address + k, *(const u8*)(address + k));
}

void remember_written(const Launch& launch) {
  Written written;
  // A kernel that was not launched to overlap has nothing to wait for.
  written.triggered_early = launch.params.overlap && launch.triggered_early;
  for (auto [address, before] : launch.written) {
    const Allocation* allocation = launch.allocations->find(address);
    if (!allocation) continue;
    auto& allocations = written.allocations;
    if (allocations.empty() || allocations.back().id != allocation->id)
      allocations.push_back({allocation->id, allocation->base, {}});
    allocations.back().bytes.push_back({address, before, *(const u8*)address});
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
