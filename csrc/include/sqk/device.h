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

// Kernels with thread block clusters are compiled for 9.0a, as those with wgmma are.
constexpr bool has_clusters(const Device& device) { return device.wgmma != 0; }

// The current GPU. Every call asks for the device and the context; what is known of them is
// remembered. A context has fewer multiprocessors than the GPU if it is a green context, or if MPS
// gives this process a part. The context is the current one, not the stream's: a green context's
// stream does not count while another context is current.
Status current_device(Device* device);

}  // namespace sqk

extern "C" SQK_EXPORT int32_t sqk_device(sqk::Device* device);
