// A decoded instruction.
#pragma once
#include "common.h"
#include "ptx/syntax.h"

namespace ptxsim {
struct Warp;
struct Instruction;
typedef void (*Handler)(Warp&, const Instruction&, u32 lanes);

// How the scheduler treats an instruction; everything else runs through its handler.
enum Control : u8 {
  kNormal,
  kBranch,
  kBranchIndexed,
  kExit,
  kBarrier,
  kClusterArrive,
  kClusterWait,
  kCollect,    // the lanes of the member mask execute it together
  kWarpSync,   // bar.warp.sync: like kCollect, but lanes may stand at different pcs
  kTryWait,    // mbarrier.try_wait and test_wait: a false result ends the turn of the group
  kWgmmaWait,  // wgmma.wait_group: waits until every warp of the warpgroup has issued the groups
  kYield,      // nanosleep
  kGridWait    // griddepcontrol.wait
};

// The classes in which the statistics count instructions.
enum InstructionClass : u8 {
  kClassInteger,
  kClassFloat,
  kClassConvert,
  kClassMove,
  kClassPredicate,
  kClassLoadGlobal,
  kClassStoreGlobal,
  kClassLoadShared,
  kClassStoreShared,
  kClassLocal,
  kClassAtomic,
  kClassControl,
  kClassBarrier,
  kClassWarp,
  kClassMma,
  kClassWgmma,
  kClassLdmatrix,
  kClassCpAsync,
  kClassTma,
  kClassMbarrier,
  kClassOther,
  kClasses
};
extern const char* const kClsNames[kClasses];

struct Instruction {
  Handler handler = nullptr;
  // An operand >= 0 is a byte offset in the register file, one < 0 is ~offset in the constants.
  const i32* operands = nullptr;
  i32 predicate = -1;     // byte offset of the guard predicate, -1: none
  u32 target = 0;         // of a branch
  u32 imm = 0, imm2 = 0;  // the handler says what they mean
  i64 offset = 0;         // added to the address
  Control control = kNormal;
  InstructionClass instruction_class = kClassOther;
  bool predicate_negated = false;
  u8 space = 0, type = 0, type2 = 0, vector = 1, modifiers = 0;
  u8 operand_count = 0, destinations = 0;
  bool reads_destination = false;  // destinations are read as well
  bool aligned = false;
  bool propagates_taint = false;  // the handler follows uninitialized values itself
  u32 line = 0;                   // of the PTX
  u32 source_line = 0;
  u16 source_file = 0;
  const Statement* statement = nullptr;
  const void* aux = nullptr;     // a table of the handler
  std::vector<i32> operand_ids;  // ids of the operands while lowering
};
}  // namespace ptxsim
