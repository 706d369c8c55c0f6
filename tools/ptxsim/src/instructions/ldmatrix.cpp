// ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements.
#include "checks.h"
#include "instructions/mma_types.h"

namespace ptxsim {
// imm: number of matrices; mod bit0: 8-byte address, bit1: trans
static void matrix_addresses(Warp& warp, const Instruction& instruction, i32 base, u32 lanes,
                             u64* a) {
  int n = (int)instruction.imm;
  if (lanes != kFullMask)
    warp.fail(kErrorLaunch, __builtin_ctz(lanes),
              format("ldmatrix/stmatrix with only lanes 0x%08x active", lanes));
  for (int l = 0; l < 8 * n; l++) {
    u64 b = (instruction.modifiers & 1)
                ? warp.source<u64>(base)[l] + (u64)instruction.offset
                : (u32)(warp.source<u32>(base)[l] + (u32)instruction.offset);
    a[l] = (Space)instruction.space == kShared ? (u32)b : shared_address(warp, l, kGeneric, b);
  }
  if (warp.launch->stats_on)
    count_shared_request(warp, a, n == 4 ? kFullMask : (1u << (8 * n)) - 1, 16);
}
static void execute_ld_matrix(Warp& warp, const Instruction& instruction,
                              u32 lanes) {  // o: d[n], addr
  int n = (int)instruction.imm;
  u64 a[32];
  matrix_addresses(warp, instruction, instruction.operands[n], lanes, a);
  u16 mat[4][8][8];
  for (int l = 0; l < 8 * n; l++)
    memcpy(mat[l / 8][l % 8], shared_pointer(warp, l, a[l], 16, kRead), 16);
  for (int q = 0; q < n; q++) {
    u32* destination = warp.destination<u32>(instruction.operands[q]);
    for (int l = 0; l < 32; l++) {
      int r = l >> 2, c = (l & 3) * 2;
      destination[l] = (instruction.modifiers & 2) ? mat[q][c][r] | ((u32)mat[q][c + 1][r] << 16)
                                                   : mat[q][r][c] | ((u32)mat[q][r][c + 1] << 16);
    }
    if (taint_on(warp)) {
      u32 t = 0;
      for (int l = 0; l < 32; l++) {
        int r = l >> 2, c = (l & 3) * 2;
        bool ok = (instruction.modifiers & 2)
                      ? bytes_init(warp, l, kShared, a[q * 8 + c] + (u32)r * 2, 2) &&
                            bytes_init(warp, l, kShared, a[q * 8 + c + 1] + (u32)r * 2, 2)
                      : bytes_init(warp, l, kShared, a[q * 8 + r] + (u32)c * 2, 4);
        t |= (u32)!ok << l;
      }
      set_taint(warp, instruction.operands[q], kFullMask, t,
                t ? taint_origin(warp, instruction, kShared, a[q * 8]) : 0);
    }
  }
}
static void execute_st_matrix(Warp& warp, const Instruction& instruction,
                              u32 lanes) {  // o: addr, s[n]
  int n = (int)instruction.imm;
  u64 a[32];
  matrix_addresses(warp, instruction, instruction.operands[0], lanes, a);
  u16 mat[4][8][8];
  for (int q = 0; q < n; q++) {
    const u32* s = warp.source<u32>(instruction.operands[1 + q]);
    for (int l = 0; l < 32; l++) {
      int r = l >> 2, c = (l & 3) * 2;
      if (instruction.modifiers & 2) {
        mat[q][c][r] = (u16)s[l];
        mat[q][c + 1][r] = (u16)(s[l] >> 16);
      } else {
        mat[q][r][c] = (u16)s[l];
        mat[q][r][c + 1] = (u16)(s[l] >> 16);
      }
    }
  }
  for (int l = 0; l < 8 * n; l++)
    memcpy(shared_pointer(warp, l, a[l], 16, kWrite), mat[l / 8][l % 8], 16);
  if (taint_on(warp))
    for (int q = 0; q < n; q++)
      if (u32 t = taint_lanes(warp, instruction.operands[1 + q]))
        for (int l = 0; l < 32; l++)
          if ((t >> l) & 1) {
            int r = l >> 2, c = (l & 3) * 2;
            if (instruction.modifiers & 2) {
              set_init(warp, l, kShared, a[q * 8 + c] + (u32)r * 2, 2, 2);
              set_init(warp, l, kShared, a[q * 8 + c + 1] + (u32)r * 2, 2, 2);
            } else
              set_init(warp, l, kShared, a[q * 8 + r] + (u32)c * 2, 4, 2);
          }
  warp.cta->cluster->progress++;
}
static void execute_mov_matrix(Warp& warp, const Instruction& instruction, u32) {
  u16 t[8][8];
  const u32* s = warp.source<u32>(instruction.operands[1]);
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  for (int l = 0; l < 32; l++) {
    t[l >> 2][(l & 3) * 2] = (u16)s[l];
    t[l >> 2][(l & 3) * 2 + 1] = (u16)(s[l] >> 16);
  }
  for (int l = 0; l < 32; l++) {
    int r = l >> 2, c = (l & 3) * 2;
    destination[l] = t[c][r] | ((u32)t[c + 1][r] << 16);
  }
}

static void lower_matrix(Lowering& lowering, const Statement& statement) {
  bool st = statement.name()[0] == 's';
  if (statement.opcode[1] != "sync" || !statement.has("m8n8") || !statement.has("b16"))
    lowering.unsupported();
  int n = statement.has("x4") ? 4 : statement.has("x2") ? 2 : 1;
  const Operand& mem = statement.operands[st ? 0 : 1];
  auto V = elements_of(statement.operands[st ? 1 : 0]);
  if ((int)V.size() != n) lowering.fail("register count does not fit");
  Space space = lowering.space() == kShared ? kShared : kGeneric;
  i64 off;
  i32 base = lowering.address_base(mem, space, off);
  std::vector<i32> ids;
  if (st) ids.push_back(base);
  for (auto& x : V) ids.push_back(st ? lowering.source(x, kB32) : lowering.destination(x, kB32));
  if (!st) ids.push_back(base);
  Instruction& instruction =
      lowering.emit(st ? execute_st_matrix : execute_ld_matrix, kClassLdmatrix, ids, st ? 0 : n);
  instruction.offset = off;
  instruction.modifiers = (lowering.slot_of(base) == 8 ? 1 : 0) | (statement.has("trans") ? 2 : 0);
  instruction.imm = (u32)n;
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
