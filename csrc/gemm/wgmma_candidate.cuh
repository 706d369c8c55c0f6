// How a file of a tuning build instantiates its candidates. Kernel ring: no torch.
#pragma once

#include <iterator>

#include "gemm/wgmma_kernel.cuh"

namespace sqk {

static_assert(SQK_TUNING, "kSm90Tiles ends with the candidates in a tuning build only");

// kPlaces: of kSm90Candidates. Empty where `tile` is none of them.
template <int... kPlaces>
WgmmaEntry find_candidate(int32_t tile) {
  constexpr int kShipped = std::size(kSm90Shipped);
  WgmmaEntry found = {};
  const auto take = [&](int32_t row, WgmmaEntry entry) {
    if (tile == row) found = entry;
  };
  (take(kShipped + kPlaces,
        {&WgmmaGemm<kShipped + kPlaces>::launch, &WgmmaGemm<kShipped + kPlaces>::workspace_bytes}),
   ...);
  return found;
}

}  // namespace sqk
