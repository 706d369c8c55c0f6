// Options, read from the environment at their first use.
#pragma once
#include <string>

#include "common/types.h"

namespace ptxsim {
struct Options {
  bool check_init = false, check_race = false, abort_on_error = false, trace = false, poison = true;
  std::string stats_file;
  int threads = 1;
  u64 spin_limit = 30000000;
  u64 seed = 0;          // PTXSIM_SEED: random schedules; 0: the fixed one
  bool weak = false;     // PTXSIM_WEAK: global stores stay in the CTA until fenced
  bool overlap = false;  // PTXSIM_OVERLAP: dependent launches start before the kernel before ends
  int async_delay = 2;   // scheduler rounds by which TMA loads are delayed (0: immediate)
};
Options& options();
void read_options_again();
}  // namespace ptxsim
