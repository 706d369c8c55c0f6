// What the C entries of every library do. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

// Plans and runs. The functions of a library are found by the types of their arguments.
template <typename Params, typename Plan>
int32_t plan_and_run(const Params& params, void* stream,
                     Status (*run)(const Params&, const Plan&, cudaStream_t)) {
  Plan made;
  Status status = plan(params, &made);
  if (status == Status::kSuccess) status = run(params, made, static_cast<cudaStream_t>(stream));
  return static_cast<int32_t>(status);
}

}  // namespace sqk
