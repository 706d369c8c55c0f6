#include "common/architecture.h"

#include <cstdio>
#include <cstdlib>

namespace ptxsim {
namespace {
const Architecture* find_architecture(std::string name) {
  static const Architecture kArchitectures[] = {
      // capability, SMs, shared bytes of a block, of an SM, registers, threads, blocks, cluster
      {80, 108, 163 * 1024, 164 * 1024, 65536, 2048, 32, 1, "sm_80"},
      {86, 84, 99 * 1024, 100 * 1024, 65536, 1536, 16, 1, "sm_86"},
      {89, 128, 99 * 1024, 100 * 1024, 65536, 1536, 24, 1, "sm_89"},
      {90, 132, 227 * 1024, 228 * 1024, 65536, 2048, 32, 8, "sm_90"},
      {100, 148, 227 * 1024, 228 * 1024, 65536, 2048, 32, 8, "sm_100"},
      {120, 170, 99 * 1024, 100 * 1024, 65536, 1536, 24, 8, "sm_120"}};
  if (name.size() > 3 && name.back() == 'a') name.pop_back();
  for (auto& architecture : kArchitectures)
    if (architecture.name == name) return &architecture;
  return nullptr;
}

Architecture read_architecture() {
  const char* name = getenv("PTXSIM_ARCH");
  const Architecture* found = find_architecture(name && *name ? name : "sm_90");
  if (!found) {
    fprintf(stderr,
            "ptxsim: PTXSIM_ARCH=%s is not one of sm_80 sm_86 sm_89 sm_90 sm_100 sm_120; using "
            "sm_90\n",
            name);
    found = find_architecture("sm_90");
  }
  Architecture result = *found;
  if (const char* sms = getenv("PTXSIM_SMS"))
    if (atoi(sms) > 0) result.sms = atoi(sms);
  return result;
}

Architecture& current() {
  static auto* architecture = new Architecture(read_architecture());
  return *architecture;
}
}  // namespace

const Architecture& architecture() { return current(); }

void read_architecture_again() { current() = read_architecture(); }
}  // namespace ptxsim
