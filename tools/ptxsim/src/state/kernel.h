// A kernel, lowered.
#pragma once
#include "state/instruction.h"

namespace ptxsim {
struct SharedVariable {
  std::string name;
  u32 offset, size;
};

struct Kernel {
  std::string name;
  const Module* module = nullptr;
  const Function* function = nullptr;
  int compute_capability = 80;
  std::vector<Instruction> code;
  std::vector<i32> operand_pool;
  std::vector<u8> constant_storage;  // holds the constants, which are 64-byte aligned
  const u8* constants = nullptr;
  u32 register_bytes = 0;
  u32 local_bytes = 0;
  u32 static_shared = 0, shared_begin = 0;  // shared_begin: the first address of shared memory
  std::vector<SharedVariable> shared_variables;
  struct Param {
    u32 offset, size;
  };
  std::vector<Param> params;
  u32 param_bytes = 0;
  bool uses_mbarrier = false, uses_cluster = false, uses_bulk = false;
  int register_estimate = 32;
  std::vector<std::pair<u32, std::string>> labels;               // sorted by pc
  std::vector<std::unique_ptr<std::vector<u32>>> branch_tables;  // targets of brx.idx
  // The place of an instruction in the PTX and in the source, for messages.
  std::string where(u32 pc) const;
};

// The variables of a loaded module.
struct ModuleData {
  std::map<std::string, u64> addresses;  // .global and .const variables -> host address
};

std::unique_ptr<Kernel> lower_kernel(const Module& module, const std::string& name,
                                     ModuleData& data, int compute_capability);
}  // namespace ptxsim
