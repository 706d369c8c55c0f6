// Where the warps of a cluster stand, for messages.
#include "schedule/cluster.h"

namespace ptxsim {
namespace {
std::string describe_state(const Cluster& cluster, const Cta& cta, const Group& group) {
  if (group.state == kGroupAtBarrier) {
    const Barrier& barrier = cta.barriers[group.aux];
    return format("waits at barrier %u (%u of %u threads arrived)", group.aux, barrier.arrived,
                  barrier.expected ? barrier.expected : cta.threads - cta.exited);
  }
  if (group.state == kGroupAtClusterBarrier)
    return format("waits at the cluster barrier (%u of %u threads arrived)",
                  cluster.barrier_arrived, cluster.total - cluster.exited);
  if (group.state == kGroupAtGridWait) return "waits for the kernel before";
  if (group.state == kGroupCollecting) {
    bool barrier = cluster.launch->kernel->code[group.pc].control == kBarrier;
    return format("waits for lanes 0x%08x to converge%s", group.aux & ~group.mask,
                  barrier ? " (barrier executed by a diverged warp)" : "");
  }
  return group.yielded ? "spins on a wait" : "runs";
}
}  // namespace

std::string thread_position(const Warp& warp, int lane) {
  const u32* block = warp.launch->params.block;
  u32 thread = (u32)warp.id * 32 + (u32)lane;
  return format("(%u,%u,%u)", thread % block[0], thread / block[0] % block[1],
                thread / (block[0] * block[1]));
}

std::string deadlock_report(Cluster& cluster, const std::string& what) {
  constexpr int kMaxLines = 48;
  std::string report = what;
  int lines = 0;
  for (auto& cta : cluster.ctas)
    for (auto& warp : cta.warps)
      for (int k = 0; k < warp.group_count; k++) {
        const Group& group = warp.groups[k];
        if (lines++ >= kMaxLines) continue;
        report +=
            format("\n    block (%u,%u,%u) warp %d lanes 0x%08x %s: %s", cta.id[0], cta.id[1],
                   cta.id[2], warp.id, group.mask, describe_state(cluster, cta, group).c_str(),
                   cluster.launch->kernel->where(group.pc).c_str());
      }
  if (lines > kMaxLines) report += format("\n    ... and %d more", lines - kMaxLines);
  return report;
}
}  // namespace ptxsim
