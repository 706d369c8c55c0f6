// Special registers: names and values.
#include "instructions/handlers.h"
#include "instructions/moves.h"

namespace ptxsim {
enum {
  kSrTidX,
  kSrTidY,
  kSrTidZ,
  kSrNtidX,
  kSrNtidY,
  kSrNtidZ,
  kSrCtaidX,
  kSrCtaidY,
  kSrCtaidZ,
  kSrNctaidX,
  kSrNctaidY,
  kSrNctaidZ,
  kSrLaneid,
  kSrWarpid,
  kSrNwarpid,
  kSrSmid,
  kSrNsmid,
  kSrGridid,
  kSrLanemaskEq,
  kSrLanemaskLe,
  kSrLanemaskLt,
  kSrLanemaskGe,
  kSrLanemaskGt,
  kSrClock,
  kSrClockHi,
  kSrClock64,
  kSrGlobaltimer,
  kSrGlobaltimerLo,
  kSrGlobaltimerHi,
  kSrClusterCtaidX,
  kSrClusterCtaidY,
  kSrClusterCtaidZ,
  kSrClusterNctaidX,
  kSrClusterNctaidY,
  kSrClusterNctaidZ,
  kSrClusterCtarank,
  kSrClusterNctarank,
  kSrClusteridX,
  kSrClusteridY,
  kSrClusteridZ,
  kSrNclusteridX,
  kSrNclusteridY,
  kSrNclusteridZ,
  kSrIsExplicitCluster,
  kSrDynamicSmemSize,
  kSrTotalSmemSize,
  kSrAggrSmemSize,
  kSrZero,
  kSrReservedSmemOffset,
  kSrEnvreg1,
  kSrEnvreg2
};
int special_register_code(const std::string& n, u8& slot) {
  slot = 4;
  static const std::unordered_map<std::string, int> t = {
      {"%tid.x", kSrTidX},
      {"%tid.y", kSrTidY},
      {"%tid.z", kSrTidZ},
      {"%ntid.x", kSrNtidX},
      {"%ntid.y", kSrNtidY},
      {"%ntid.z", kSrNtidZ},
      {"%ctaid.x", kSrCtaidX},
      {"%ctaid.y", kSrCtaidY},
      {"%ctaid.z", kSrCtaidZ},
      {"%nctaid.x", kSrNctaidX},
      {"%nctaid.y", kSrNctaidY},
      {"%nctaid.z", kSrNctaidZ},
      {"%laneid", kSrLaneid},
      {"%warpid", kSrWarpid},
      {"%nwarpid", kSrNwarpid},
      {"%smid", kSrSmid},
      {"%nsmid", kSrNsmid},
      {"%gridid", kSrGridid},
      {"%lanemask_eq", kSrLanemaskEq},
      {"%lanemask_le", kSrLanemaskLe},
      {"%lanemask_lt", kSrLanemaskLt},
      {"%lanemask_ge", kSrLanemaskGe},
      {"%lanemask_gt", kSrLanemaskGt},
      {"%clock", kSrClock},
      {"%clock_hi", kSrClockHi},
      {"%clock64", kSrClock64},
      {"%globaltimer", kSrGlobaltimer},
      {"%globaltimer_lo", kSrGlobaltimerLo},
      {"%globaltimer_hi", kSrGlobaltimerHi},
      {"%cluster_ctaid.x", kSrClusterCtaidX},
      {"%cluster_ctaid.y", kSrClusterCtaidY},
      {"%cluster_ctaid.z", kSrClusterCtaidZ},
      {"%cluster_nctaid.x", kSrClusterNctaidX},
      {"%cluster_nctaid.y", kSrClusterNctaidY},
      {"%cluster_nctaid.z", kSrClusterNctaidZ},
      {"%cluster_ctarank", kSrClusterCtarank},
      {"%cluster_nctarank", kSrClusterNctarank},
      {"%clusterid.x", kSrClusteridX},
      {"%clusterid.y", kSrClusteridY},
      {"%clusterid.z", kSrClusteridZ},
      {"%nclusterid.x", kSrNclusteridX},
      {"%nclusterid.y", kSrNclusteridY},
      {"%nclusterid.z", kSrNclusteridZ},
      {"%is_explicit_cluster", kSrIsExplicitCluster},
      {"%dynamic_smem_size", kSrDynamicSmemSize},
      {"%total_smem_size", kSrTotalSmemSize},
      {"%aggr_smem_size", kSrAggrSmemSize},
      {"%reserved_smem_offset_begin", kSrZero},
      {"%reserved_smem_offset_end", kSrReservedSmemOffset},
      {"%reserved_smem_offset_cap", kSrReservedSmemOffset}};
  auto it = t.find(n);
  if (n == "%envreg1") return kSrEnvreg1;
  if (n == "%envreg2") return kSrEnvreg2;
  if (it == t.end()) {
    if (n.compare(0, 7, "%envreg") == 0 || n.compare(0, 3, "%pm") == 0) return kSrZero;
    return -1;
  }
  if (it->second == kSrClock64 || it->second == kSrGlobaltimer || it->second == kSrGridid) slot = 8;
  if (it->second == kSrGridid) {
    slot = 8;
  }
  return it->second;
}
void execute_sreg(Warp& warp, const Instruction& instruction, u32 lanes) {
  int c = (int)instruction.imm;
  if (c <= kSrTidZ) {
    u32* destination = warp.destination<u32>(instruction.operands[0]);
    const u32* t = warp.tid[c - kSrTidX];
    for_each_lane(lanes, [&](int lane) { destination[lane] = t[lane]; });
    return;
  }
  Cta& cta = *warp.cta;
  auto& p = warp.launch->params;
  u64 v = 0;
  switch (c) {
    case kSrNtidX:
    case kSrNtidY:
    case kSrNtidZ:
      v = p.block[c - kSrNtidX];
      break;
    case kSrCtaidX:
    case kSrCtaidY:
    case kSrCtaidZ:
      v = cta.id[c - kSrCtaidX];
      break;
    case kSrNctaidX:
    case kSrNctaidY:
    case kSrNctaidZ:
      v = p.grid[c - kSrNctaidX];
      break;
    case kSrLaneid: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)lane; });
      return;
    }
    case kSrWarpid:
      v = (u32)warp.id;
      break;
    case kSrNwarpid:
      v = (u32)cta.warps.size();
      break;
    case kSrSmid:
      v = cta.linear % (u32)architecture().sms;
      break;
    case kSrNsmid:
      v = (u32)architecture().sms;
      break;
    case kSrGridid:
      v = 1;
      break;
    case kSrLanemaskEq: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = 1u << lane; });
      return;
    }
    case kSrLanemaskLe: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = (2u << lane) - 1; });
      return;
    }
    case kSrLanemaskLt: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = (1u << lane) - 1; });
      return;
    }
    case kSrLanemaskGe: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = ~((1u << lane) - 1); });
      return;
    }
    case kSrLanemaskGt: {
      u32* destination = warp.destination<u32>(instruction.operands[0]);
      for_each_lane(lanes, [&](int lane) { destination[lane] = ~((2u << lane) - 1); });
      return;
    }
    case kSrClock:
      v = (u32)warp.worker->sequence;
      break;
    case kSrClockHi:
      v = warp.worker->sequence >> 32;
      break;
    case kSrClock64:
      v = warp.worker->sequence;
      break;
    case kSrGlobaltimer:
      v = warp.worker->sequence;
      break;
    case kSrGlobaltimerLo:
      v = (u32)warp.worker->sequence;
      break;
    case kSrGlobaltimerHi:
      v = warp.worker->sequence >> 32;
      break;
    case kSrClusterCtaidX:
    case kSrClusterCtaidY:
    case kSrClusterCtaidZ:
      v = cta.cluster_rank[c - kSrClusterCtaidX];
      break;
    case kSrClusterNctaidX:
    case kSrClusterNctaidY:
    case kSrClusterNctaidZ:
      v = p.cluster[c - kSrClusterNctaidX];
      break;
    case kSrClusterCtarank:
      v = cta.rank;
      break;
    case kSrClusterNctarank:
      v = p.cluster[0] * p.cluster[1] * p.cluster[2];
      break;
    case kSrClusteridX:
    case kSrClusteridY:
    case kSrClusteridZ:
      v = cta.cluster->id[c - kSrClusteridX];
      break;
    case kSrNclusteridX:
    case kSrNclusteridY:
    case kSrNclusteridZ:
      v = warp.launch->cluster_count[c - kSrNclusteridX];
      break;
    case kSrIsExplicitCluster:
      write_predicate(warp, instruction.operands[0],
                      p.cluster[0] * p.cluster[1] * p.cluster[2] > 1 ? kFullMask : 0, lanes);
      return;
    case kSrDynamicSmemSize:
      v = p.dynamic_shared;
      break;
    case kSrTotalSmemSize:
      v = cta.shared_end - cta.shared_begin;
      break;
    case kSrAggrSmemSize:
      v = cta.shared_end;
      break;
    case kSrReservedSmemOffset:
      v = cta.shared_begin;
      break;
    case kSrEnvreg1:
      v = warp.launch->grid_workspace >> 32;
      break;  // workspace of grid-wide barriers
    case kSrEnvreg2:
      v = (u32)warp.launch->grid_workspace;
      break;
  }
  if (c == kSrClock64 || c == kSrGlobaltimer || c == kSrGridid) {
    u64* destination = warp.destination<u64>(instruction.operands[0]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = v; });
  } else {
    u32* destination = warp.destination<u32>(instruction.operands[0]);
    for_each_lane(lanes, [&](int lane) { destination[lane] = (u32)v; });
  }
}

}  // namespace ptxsim
