// The shape of a streaming GEMM's launch. Kernel ring: no torch.
#pragma once

#include <algorithm>

#include "common/arithmetic.h"
#include "common/launch.h"
#include "gemm/stream/layout.h"

namespace sqk {

// The shape of a block, and the number of blocks.
struct StreamLaunch {
  int32_t warps;
  bool resident;
  int64_t activation_bytes;
  int64_t shared_bytes;
  int64_t blocks;
};

inline StreamLaunch choose_launch(const GemmParams& params, bool quantizes, int groups,
                                  int most_warps, const Device& device) {
  const bool w4 = is_w4(params);
  StreamLaunch launch = {};
  const auto fits = [&](int warps, bool resident) {
    launch.warps = warps;
    launch.resident = resident;
    launch.activation_bytes = activation_bytes(params.m, params.k, groups, warps, resident, w4);
    launch.shared_bytes = stream_shared_bytes(launch.activation_bytes, groups, warps, w4);
    return launch.shared_bytes <= device.shared_bytes;
  };
  // First as many warps as fit. Then, if there is room, resident activations, which are read once
  // per block instead of once per tile; activations that the block quantizes must be resident, and
  // those that meet weights of 4 bits.
  const int fewest = w4 ? kFewestW4Warps : 1;
  bool found = false;
  for (int warps = std::clamp(most_warps, fewest, kStreamWarps); !found && warps >= fewest;
       --warps) {
    found = fits(warps, true) || (!quantizes && !w4 && fits(warps, false));
  }
  if (!found) return {};
  // As many blocks as run at a time. Each takes tile after tile, so its ring never runs empty and
  // it quantizes x once.
  const int64_t per_sm = std::clamp<int64_t>(
      (device.shared_bytes + kDriverShared) / (launch.shared_bytes + kDriverShared), 1,
      kStreamWarps / launch.warps);
  const int64_t tiles = divide_up(params.n, kStreamChannels);
  launch.blocks = std::min(tiles, per_sm * device.sms);
  return launch;
}

}  // namespace sqk
