// ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements.
#include "checks.h"
#include "instructions/mma_types.h"

namespace ptxsim {
// imm: number of matrices; modifiers: bit 0 8-byte address, bit 1 transposed.
static void matrix_addresses(Warp& warp, const Instruction& instruction, i32 base, u32 lanes,
                             u64* addresses) {
  int count = (int)instruction.imm;
  if (lanes != kFullMask)
    warp.fail(kErrorLaunch, __builtin_ctz(lanes),
              format("ldmatrix/stmatrix with only lanes 0x%08x active", lanes));
  for (int lane = 0; lane < 8 * count; lane++) {
    u64 address = (instruction.modifiers & 1)
                      ? warp.source<u64>(base)[lane] + (u64)instruction.offset
                      : (u32)(warp.source<u32>(base)[lane] + (u32)instruction.offset);
    addresses[lane] = (Space)instruction.space == kShared
                          ? (u32)address
                          : shared_address(warp, lane, kGeneric, address);
  }
  if (warp.launch->stats_on)
    count_shared_request(warp, addresses, count == 4 ? kFullMask : (1u << (8 * count)) - 1, 16);
}
// Operands: destinations[count], address.
static void execute_ld_matrix(Warp& warp, const Instruction& instruction, u32 lanes) {
  int count = (int)instruction.imm;
  u64 addresses[32];
  matrix_addresses(warp, instruction, instruction.operands[count], lanes, addresses);
  u16 matrices[4][8][8];
  for (int lane = 0; lane < 8 * count; lane++)
    memcpy(matrices[lane / 8][lane % 8], shared_pointer(warp, lane, addresses[lane], 16, kRead),
           16);
  for (int matrix = 0; matrix < count; matrix++) {
    u32* destination = warp.destination<u32>(instruction.operands[matrix]);
    for (int lane = 0; lane < 32; lane++) {
      int row = lane >> 2, column = (lane & 3) * 2;
      destination[lane] =
          (instruction.modifiers & 2)
              ? matrices[matrix][column][row] | ((u32)matrices[matrix][column + 1][row] << 16)
              : matrices[matrix][row][column] | ((u32)matrices[matrix][row][column + 1] << 16);
    }
    if (taint_on(warp)) {
      u32 tainted = 0;
      for (int lane = 0; lane < 32; lane++) {
        int row = lane >> 2, column = (lane & 3) * 2;
        bool initialized =
            (instruction.modifiers & 2)
                ? bytes_init(warp, lane, kShared, addresses[matrix * 8 + column] + (u32)row * 2,
                             2) &&
                      bytes_init(warp, lane, kShared,
                                 addresses[matrix * 8 + column + 1] + (u32)row * 2, 2)
                : bytes_init(warp, lane, kShared, addresses[matrix * 8 + row] + (u32)column * 2, 4);
        tainted |= (u32)!initialized << lane;
      }
      set_taint(warp, instruction.operands[matrix], kFullMask, tainted,
                tainted ? taint_origin(warp, instruction, kShared, addresses[matrix * 8]) : 0);
    }
  }
}
// Operands: address, sources[count].
static void execute_st_matrix(Warp& warp, const Instruction& instruction, u32 lanes) {
  int count = (int)instruction.imm;
  u64 addresses[32];
  matrix_addresses(warp, instruction, instruction.operands[0], lanes, addresses);
  u16 matrices[4][8][8];
  for (int matrix = 0; matrix < count; matrix++) {
    const u32* source = warp.source<u32>(instruction.operands[1 + matrix]);
    for (int lane = 0; lane < 32; lane++) {
      int row = lane >> 2, column = (lane & 3) * 2;
      if (instruction.modifiers & 2) {
        matrices[matrix][column][row] = (u16)source[lane];
        matrices[matrix][column + 1][row] = (u16)(source[lane] >> 16);
      } else {
        matrices[matrix][row][column] = (u16)source[lane];
        matrices[matrix][row][column + 1] = (u16)(source[lane] >> 16);
      }
    }
  }
  for (int lane = 0; lane < 8 * count; lane++)
    memcpy(shared_pointer(warp, lane, addresses[lane], 16, kWrite), matrices[lane / 8][lane % 8],
           16);
  if (taint_on(warp))
    for (int matrix = 0; matrix < count; matrix++)
      if (u32 tainted = taint_lanes(warp, instruction.operands[1 + matrix]))
        for (int lane = 0; lane < 32; lane++)
          if ((tainted >> lane) & 1) {
            int row = lane >> 2, column = (lane & 3) * 2;
            if (instruction.modifiers & 2) {
              set_init(warp, lane, kShared, addresses[matrix * 8 + column] + (u32)row * 2, 2, 2);
              set_init(warp, lane, kShared, addresses[matrix * 8 + column + 1] + (u32)row * 2, 2,
                       2);
            } else
              set_init(warp, lane, kShared, addresses[matrix * 8 + row] + (u32)column * 2, 4, 2);
          }
  warp.cta->cluster->progress++;
}
static void execute_mov_matrix(Warp& warp, const Instruction& instruction, u32) {
  u16 matrix[8][8];
  const u32* source = warp.source<u32>(instruction.operands[1]);
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  for (int lane = 0; lane < 32; lane++) {
    matrix[lane >> 2][(lane & 3) * 2] = (u16)source[lane];
    matrix[lane >> 2][(lane & 3) * 2 + 1] = (u16)(source[lane] >> 16);
  }
  for (int lane = 0; lane < 32; lane++) {
    int row = lane >> 2, column = (lane & 3) * 2;
    destination[lane] = matrix[column][row] | ((u32)matrix[column + 1][row] << 16);
  }
}

static void lower_matrix(Lowering& lowering, const Statement& statement) {
  bool stores = statement.name()[0] == 's';
  if (statement.opcode[1] != "sync" || !statement.has("m8n8") || !statement.has("b16"))
    lowering.unsupported();
  int count = statement.has("x4") ? 4 : statement.has("x2") ? 2 : 1;
  const Operand& memory = statement.operands[stores ? 0 : 1];
  auto registers = elements_of(statement.operands[stores ? 1 : 0]);
  if ((int)registers.size() != count) lowering.fail("register count does not fit");
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 offset;
  i32 base = lowering.address_base(memory, space, offset);
  std::vector<i32> ids;
  if (stores) ids.push_back(base);
  for (auto& operand : registers)
    ids.push_back(stores ? lowering.source(operand, kB32) : lowering.destination(operand, kB32));
  if (!stores) ids.push_back(base);
  Instruction& instruction = lowering.emit(stores ? execute_st_matrix : execute_ld_matrix,
                                           kClassLdmatrix, ids, stores ? 0 : count);
  instruction.offset = offset;
  instruction.modifiers = (lowering.slot_of(base) == 8 ? 1 : 0) | (statement.has("trans") ? 2 : 0);
  instruction.imm = (u32)count;
  instruction.space = space;
  instruction.propagates_taint = true;
  collect_warp(instruction);
}

static void lower_mov_matrix(Lowering& lowering, const Statement& statement) {
  i32 a = lowering.source(statement.operands[1], kB32);
  Instruction& instruction =
      lowering.emit(execute_mov_matrix, kClassLdmatrix,
                    {lowering.destination(statement.operands[0], kB32), a}, 1);
  collect_warp(instruction);
}

static const Opcodes kOpcodes{
    {"ldmatrix", lower_matrix}, {"stmatrix", lower_matrix}, {"movmatrix", lower_mov_matrix}};
}  // namespace ptxsim
