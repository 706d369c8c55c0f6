// The registry behind memory/allocations.h.
#pragma once
#include <deque>
#include <mutex>

#include "memory/allocations.h"

namespace ptxsim {
struct Registry {
  std::mutex mutex;
  std::map<u64, Allocation> live;
  std::deque<Allocation> freed;  // kept so that a use after free is seen; newest last
  size_t freed_bytes = 0, total = 0;
  u64 next_id = 1;
  std::shared_ptr<const AllocationMap> snapshot;
};
Registry& registry();
}  // namespace ptxsim
