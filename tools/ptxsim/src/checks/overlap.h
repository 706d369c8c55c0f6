// Programmatic dependent launch (PTXSIM_OVERLAP). Launches run one after another here, so an early
// start is played: before the kernel runs, the bytes that the kernel before it wrote are given back
// as they were, and it runs until its warps stand at griddepcontrol.wait. Then the new bytes
// return, and it goes on. What it read too early is wrong, and what it writes too early is an
// error.
#pragma once
#include "exec.h"

namespace ptxsim {
inline bool starts_early(const Launch& launch) {
  return options().overlap && launch.params.overlap;
}

// Memory as it was before the kernel before, in a scope. If that kernel let this one start before
// it had waited itself, memory is as it was before the one before it, and so on.
class EarlierMemory {
 public:
  explicit EarlierMemory(const Launch& launch);
  ~EarlierMemory();
  EarlierMemory(const EarlierMemory&) = delete;

 private:
  struct Bytes {
    u8* to;
    u8 value;
  };
  std::vector<Bytes> now_;  // in the order in which they were replaced
};

// A kernel is about to write bytes of global memory.
void note_written(Launch& launch, u64 address, u32 bytes);
// The launch has succeeded.
void remember_written(const Launch& launch);

// Something else than a kernel came last in the stream, and a kernel after it starts when it is
// done.
void forget_kernels();

// Throws if a block of a dependent launch has ended and none of its threads has waited.
void check_waited(const Cluster& cluster);
}  // namespace ptxsim
