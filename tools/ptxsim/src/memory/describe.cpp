// What lies at or near an address, for messages.
#include "memory/registry.h"

namespace ptxsim {
namespace {
typedef unsigned long long Number;
constexpr u64 kFar = 1ull << 30;  // further away than this, an allocation explains nothing
constexpr u64 kNear = 65536;

std::string describe(const Allocation& allocation) {
  return format("%s allocation #%llu [0x%llx, +%llu bytes)", allocation.kind, (Number)allocation.id,
                (Number)allocation.base, (Number)allocation.size);
}

const Allocation* find_freed(const Registry& registry, u64 address) {
  for (size_t i = registry.freed.size(); i-- > 0;) {
    const Allocation& freed = registry.freed[i];
    if (address >= freed.base && address < freed.end()) return &freed;
  }
  return nullptr;
}

std::string describe_distance(u64 address, u64 distance, const char* where,
                              const Allocation& allocation) {
  if (distance > kFar)
    return address < kNear ? "no allocation is near; a null pointer?"
                           : "no allocation is near; host memory that was not registered with "
                             "ptxsim_register_host?";
  return format(
      "address is %llu bytes %s %s%s", (Number)distance, where, describe(allocation).c_str(),
      distance > kNear ? " (host memory that was not registered with ptxsim_register_host?)" : "");
}
}  // namespace

std::string memory_describe(u64 address) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (const Allocation* freed = find_freed(all, address))
    return format("address is %llu bytes into FREED %s: use after free",
                  (Number)(address - freed->base), describe(*freed).c_str());
  auto next = all.live.upper_bound(address);
  const Allocation* above = next != all.live.end() ? &next->second : nullptr;
  const Allocation* below = next != all.live.begin() ? &std::prev(next)->second : nullptr;
  if (below && address < below->end())
    return format("address is %llu bytes into %s (access runs past its end or is read-only)",
                  (Number)(address - below->base), describe(*below).c_str());
  if (!below && !above)
    return "there is no allocation at all (host memory must be registered with "
           "ptxsim_register_host)";
  u64 past = below ? address - below->end() : ~0ull, before = above ? above->base - address : ~0ull;
  return past <= before ? describe_distance(address, past, "past the end of", *below)
                        : describe_distance(address, before, "before", *above);
}
}  // namespace ptxsim
