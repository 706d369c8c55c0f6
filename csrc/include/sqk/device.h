// The GPU that a plan is made for. Public ring: no torch, no CUTLASS, compiles with a plain C++
// compiler.
#pragma once

#include <cstdint>

#include "sqk/status.h"

namespace sqk {

// What the choice of a kernel depends on besides the problem.
struct Device {
  int32_t sms;           // multiprocessors that the current context may use
  int32_t capability;    // 10 * major + minor
  int32_t shared_bytes;  // the most that one block can be given
  int32_t wgmma;         // 1: the library holds the kernels for 9.0a and this GPU runs them
  int32_t part;          // 1: the GPU has more multiprocessors than the context may use
};

// Kernels with thread block clusters are compiled for 9.0a, like those with wgmma.
constexpr bool has_clusters(const Device& device) { return device.wgmma != 0; }

// Describes the current GPU. Every call asks which device and context are current; facts about them
// are cached. A context has fewer multiprocessors than the GPU if it is a green context or if MPS
// gives this process a part. The current context counts, not that of the stream.
Status current_device(Device* device);

}  // namespace sqk

extern "C" SQK_EXPORT int32_t sqk_device(sqk::Device* device);
