// The GPU that the current context runs on, and how much of it. Kernel ring: no torch.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

constexpr int kMaxDevices = 64;  // of which anything is remembered

struct Gpu {
  int32_t sms;  // multiprocessors that the context may use
  int32_t all_sms;
  int32_t capability;    // 10 * major + minor
  int32_t shared_bytes;  // the most that one block can be given
};

// Asked for at each call; what was answered is remembered, per device and per context. A context
// has fewer multiprocessors than the GPU if it is a green context, or if MPS gives this process a
// part. A stream of a green context while another context is current is not seen.
Status current_gpu(Gpu* gpu);

}  // namespace sqk
