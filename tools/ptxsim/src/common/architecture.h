// The architecture that is simulated.
#pragma once
#include <string>

namespace ptxsim {
struct Architecture {
  int compute_capability;  // 80, 86, 89, 90, 100, 120
  int sms, shared_bytes_optin, shared_bytes_per_sm, registers_per_sm, max_threads_per_sm,
      max_blocks_per_sm, max_cluster;
  std::string name;  // "sm_90"
};
const Architecture& architecture();
void read_architecture_again();
}  // namespace ptxsim
