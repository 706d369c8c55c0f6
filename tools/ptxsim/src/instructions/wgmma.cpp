// wgmma: each warp of a warpgroup computes its own 16 rows; nothing crosses warps.
#include "checks.h"
#include "instructions/mma_types.h"
#include "instructions/moves.h"
#include "instructions/wgmma_tile.h"

namespace ptxsim {
namespace {
// The operands of one wgmma for one warp.
struct Tiles {
  const MmaInfo& info;
  const i32* d;
  bool accumulates;
  int element_bytes, row_bytes;
  u64 a_descriptor = 0, b_descriptor = 0;
  alignas(64) u8 a[16 * 32];
  alignas(64) u8 b[256 * 32];
  u8 bad_a[16] = {}, bad_b[256] = {};  // rows that read uninitialized bytes

  explicit Tiles(const MmaInfo& info, const i32* d = nullptr, bool accumulates = false)
      : info(info),
        d(d),
        accumulates(accumulates),
        element_bytes(bits_of(info.a_type) / 8),
        row_bytes(info.k * element_bytes) {}
  TileRows rows_of_a(Warp& warp) const {
    return {a_descriptor, (warp.id & 3) * 16, 16, row_bytes, element_bytes, info.trans_a != 0};
  }
  TileRows rows_of_b() const {
    return {b_descriptor, 0, info.n, row_bytes, element_bytes, info.trans_b != 0};
  }
  u64 hash_of_a() const { return info.a_in_registers ? 0 : hash_tile(a, 16 * (size_t)row_bytes); }
  u64 hash_of_b() const { return hash_tile(b, (size_t)info.n * (size_t)row_bytes); }
};
}  // namespace

static void read_a_registers(Warp& warp, Tiles& tiles, const i32* operands) {
  int count = 4 / tiles.element_bytes;  // elements of a register
  for (int r = 0; r < 4; r++) {
    const u32* v = warp.source<u32>(operands[r]);
    for (int l = 0; l < 32; l++)
      memcpy(tiles.a + ((l >> 2) + 8 * (r & 1)) * tiles.row_bytes +
                 ((r >> 1) * 4 * count + (l & 3) * count) * tiles.element_bytes,
             &v[l], 4);
    if (!taint_on(warp)) continue;
    u32 t = taint_lanes(warp, operands[r]);
    for (int l = 0; l < 32; l++)
      if ((t >> l) & 1) tiles.bad_a[(l >> 2) + 8 * (r & 1)] = 1;
  }
}

// Init check: an element of D depends on its row of A, its column of B and its old value.
static void taint_wgmma(Warp& warp, const Instruction& instruction, const Tiles& tiles) {
  u32 any = 0;
  for (u8 x : tiles.bad_a) any |= x;
  for (u8 x : tiles.bad_b) any |= x;
  u32 origin =
      any ? taint_origin(warp, instruction, kShared, (tiles.b_descriptor & 0x3fff) << 4) : 0;
  bool packed = tiles.info.d_type == kF16;
  for (int r = 0; r < tiles.info.c_count; r++) {
    u32 t = tiles.accumulates ? taint_lanes(warp, tiles.d[r]) : 0;
    u32 source = t ? taint_origin_of(warp, tiles.d[r]) : origin;
    for (int l = 0; any && l < 32; l++) {
      int row = (l >> 2) + 8 * (packed ? r & 1 : (r >> 1) & 1);
      int column = (packed ? r / 2 : r / 4) * 8 + (l & 3) * 2 + (packed ? 0 : r & 1);
      if (tiles.bad_a[row] || tiles.bad_b[column] || (packed && tiles.bad_b[column + 1]))
        t |= 1u << l;
    }
    set_taint(warp, tiles.d[r], kFullMask, t, source);
  }
}

static void note_read(Warp& warp, const Instruction& instruction, const Tiles& tiles) {
  Warp::WgmmaRead read;
  read.instruction = &instruction;
  read.group = warp.wgmma_group;
  read.a_descriptor = tiles.a_descriptor;
  read.b_descriptor = tiles.b_descriptor;
  read.a_hash = tiles.hash_of_a();
  read.b_hash = tiles.hash_of_b();
  warp.wgmma_reads.push_back(read);
}

static void multiply_integers(Warp& warp, const Tiles& tiles) {
  const MmaInfo& info = tiles.info;
  auto widen = [](u8 x, Type type) { return type == kS8 ? (i16)(i8)x : (i16)x; };
  alignas(64) i16 A[16][32], B[256][32];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 32; k++) A[i][k] = widen(tiles.a[i * 32 + k], info.a_type);
  for (int i = 0; i < info.n; i++)
    for (int k = 0; k < 32; k++) B[i][k] = widen(tiles.b[i * 32 + k], info.b_type);
  for (int q = 0; q < info.n / 8; q++) {
    i32 D[16][8];
    for (int i = 0; i < 16; i++)
      for (int n = 0; n < 8; n++) {
        i32 sum = 0;
        const i16 *x = A[i], *y = B[q * 8 + n];
        for (int k = 0; k < 32; k++) sum += (i32)x[k] * y[k];
        D[i][n] = sum;
      }
    for (int r = 0; r < 4; r++) {
      i32* destination = warp.destination<i32>(tiles.d[q * 4 + r]);
      for (int l = 0; l < 32; l++) {
        i64 sum = D[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)];
        if (tiles.accumulates) sum += destination[l];
        destination[l] = info.saturate ? saturated(sum) : (i32)sum;
      }
    }
  }
}

// Adds eight columns of sums to accumulators of two halves.
static void add_to_halves(Warp& warp, const Tiles& tiles, int q, const double (*D)[8]) {
  for (int r = 0; r < 2; r++) {
    u32* destination = warp.destination<u32>(tiles.d[q * 2 + r]);
    for (int l = 0; l < 32; l++) {
      u32 v = 0;
      for (int e = 0; e < 2; e++) {
        double old =
            tiles.accumulates ? (double)half_bits_to_float((u16)(destination[l] >> (16 * e))) : 0.0;
        double sum = old + D[(l >> 2) + 8 * r][(l & 3) * 2 + e];
        v |= (u32)(u16)to_small(sum, kSmallF16) << (16 * e);
      }
      destination[l] = v;
    }
  }
}

static void add_to_floats(Warp& warp, const Tiles& tiles, int q, const double (*D)[8]) {
  for (int r = 0; r < 4; r++) {
    float* destination = warp.destination<float>(tiles.d[q * 4 + r]);
    for (int l = 0; l < 32; l++) {
      double sum = D[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)];
      if (tiles.accumulates) sum += destination[l];
      destination[l] = canonical_nan((float)sum);
    }
  }
}

static void multiply_floats(Warp& warp, const Tiles& tiles) {
  const MmaInfo& info = tiles.info;
  auto decode = [&](const u8* tile, int row, int k, Type type) {
    u32 v = 0;
    memcpy(&v, tile + row * tiles.row_bytes + k * tiles.element_bytes, (size_t)tiles.element_bytes);
    return decode_float(v, 0, type);
  };
  alignas(64) float A[16][32], B[256][32];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < info.k; k++)
      A[i][k] = (float)info.scale_a * decode(tiles.a, i, k, info.a_type);
  for (int i = 0; i < info.n; i++)
    for (int k = 0; k < info.k; k++)
      B[i][k] = (float)info.scale_b * decode(tiles.b, i, k, info.b_type);
  for (int q = 0; q < info.n / 8; q++) {
    double D[16][8];
    for (int i = 0; i < 16; i++)
      for (int n = 0; n < 8; n++) {
        double sum = 0;
        for (int k = 0; k < info.k; k++) sum += (double)A[i][k] * B[q * 8 + n][k];
        D[i][n] = sum;
      }
    if (info.d_type == kF16)
      add_to_halves(warp, tiles, q, D);
    else
      add_to_floats(warp, tiles, q, D);
  }
}

// Operands: d[c_count], a (a descriptor or four registers), descriptor of b, predicate scale-d.
static void execute_wgmma(Warp& warp, const Instruction& instruction, u32 lanes) {
  const MmaInfo& info = *(const MmaInfo*)instruction.aux;
  if (lanes != kFullMask)
    warp.fail(kErrorLaunch, __builtin_ctz(lanes),
              format("wgmma with only lanes 0x%08x active", lanes));
  const i32 *d = instruction.operands, *a = d + info.c_count;
  const i32* b = a + (info.a_in_registers ? 4 : 1);
  Tiles tiles(info, d, read_predicate(warp, b[1]) & 1);
  warp.worker->stats.wgmma_macs += 16ull * info.n * info.k;
  bool tainted = taint_on(warp);
  tiles.b_descriptor = warp.source<u64>(*b)[0];
  fetch_tile(warp, tiles.rows_of_b(), tiles.b, true, tainted ? tiles.bad_b : nullptr);
  if (info.a_in_registers) {
    read_a_registers(warp, tiles, a);
  } else {
    tiles.a_descriptor = warp.source<u64>(*a)[0];
    fetch_tile(warp, tiles.rows_of_a(warp), tiles.a, true, tainted ? tiles.bad_a : nullptr);
  }
  if (tainted) taint_wgmma(warp, instruction, tiles);
  if (warp.launch->check_race) note_read(warp, instruction, tiles);
  if (is_integer(info.a_type))
    multiply_integers(warp, tiles);
  else
    multiply_floats(warp, tiles);
}

static void execute_wg_commit(Warp& warp, const Instruction&, u32) {
  warp.wgmma_group++;
  warp.cta->cluster->progress++;
  if (warp.launch->check_race) clock_release(warp, warp.wgmma_clock);
}
// A wgmma is one operation of four warps: it is complete for one of them only when all have issued
// it.
bool wgmma_wait_ready(Warp& warp, const Instruction& instruction) {
  if (warp.wgmma_group <= instruction.imm) return true;
  u32 need = warp.wgmma_group - instruction.imm;
  size_t b = (size_t)(warp.id & ~3);
  for (size_t q = b; q < b + 4 && q < warp.cta->warps.size(); q++)
    if (warp.cta->warps[q].alive && warp.cta->warps[q].wgmma_group < need) return false;
  return true;
}

static bool overwritten(Warp& warp, const Warp::WgmmaRead& read) {
  Tiles tiles(*(const MmaInfo*)read.instruction->aux);
  tiles.a_descriptor = read.a_descriptor;
  tiles.b_descriptor = read.b_descriptor;
  fetch_tile(warp, tiles.rows_of_b(), tiles.b, false);
  if (tiles.hash_of_b() != read.b_hash) return true;
  if (tiles.info.a_in_registers) return false;
  fetch_tile(warp, tiles.rows_of_a(warp), tiles.a, false);
  return tiles.hash_of_a() != read.a_hash;
}

// With the race check on, the operands of the groups waited for must not have changed since the
// wgmma was issued.
static void execute_wg_wait(Warp& warp, const Instruction& instruction, u32) {
  if (!warp.launch->check_race) return;
  size_t b = (size_t)(warp.id & ~3);
  if (warp.wgmma_group > instruction.imm)
    for (size_t q = b; q < b + 4 && q < warp.cta->warps.size(); q++)
      clock_acquire(warp, warp.cta->warps[q].wgmma_clock);
  size_t kept = 0;
  for (size_t q = 0; q < warp.wgmma_reads.size(); q++) {
    auto read = warp.wgmma_reads[q];
    if (read.group + instruction.imm >= warp.wgmma_group)
      warp.wgmma_reads[kept++] = read;
    else if (overwritten(warp, read))
      warp.fail(kErrorCheck, 0,
                format("shared memory read by an asynchronous wgmma (PTX line %u) was overwritten "
                       "before wgmma.wait_group",
                       read.instruction->line));
  }
  warp.wgmma_reads.resize(kept);
}

static void lower_wg_fence(Lowering& lowering, const Statement&) {
  collect_warp(lowering.emit(execute_nop, kClassWgmma, {}, 0));
}

static void lower_wg_commit(Lowering& lowering, const Statement&) {
  collect_warp(lowering.emit(execute_wg_commit, kClassWgmma, {}, 0));
}

static void lower_wg_wait(Lowering& lowering, const Statement& statement) {
  Instruction& instruction = lowering.emit(execute_wg_wait, kClassWgmma, {}, 0);
  instruction.imm = (u32)statement.operands[0].bits;
  instruction.control = kWgmmaWait;
  instruction.imm2 = 0xff;
}

static MmaInfo* wgmma_info(Lowering& lowering, const Statement& statement) {
  if (statement.has("sp")) lowering.unsupported();
  auto* F = new MmaInfo;
  if (!parse_shape(statement, F->m, F->n, F->k)) lowering.unsupported();
  auto ts = lowering.types();
  if (ts.size() != 3) lowering.unsupported();
  F->d_type = ts[0];
  F->a_type = ts[1];
  F->b_type = ts[2];
  F->saturate = statement.has("satfinite");
  if (bits_of(F->a_type) < 8 || bits_of(F->a_type) * F->k != 256) lowering.unsupported();
  F->c_count = F->d_type == kF16 ? F->n / 4 : F->n / 2;
  F->a_in_registers = statement.operands[1].kind == Operand::kVector;
  return F;
}

static void lower_wgmma(Lowering& lowering, const Statement& statement) {
  MmaInfo* F = wgmma_info(lowering, statement);
  auto D = elements_of(statement.operands[0]);
  if ((int)D.size() != F->c_count) lowering.fail("accumulator count does not fit the shape");
  std::vector<i32> src, ids;
  if (F->a_in_registers) {
    if (statement.operands[1].elements.size() != 4)
      lowering.fail("A fragment of 4 registers expected");
    for (auto& x : statement.operands[1].elements) src.push_back(lowering.source(x, kB32));
  } else
    src.push_back(lowering.source(statement.operands[1], kB64));
  src.push_back(lowering.source(statement.operands[2], kB64));
  size_t q = 3;
  src.push_back(statement.operands.size() > q ? lowering.predicate_source(statement.operands[q])
                                              : lowering.constant_predicate(true));
  q++;
  auto imm = [&](int dflt) -> int {
    if (q >= statement.operands.size()) return dflt;
    const Operand& operand = statement.operands[q++];
    if (operand.kind != Operand::kInteger) lowering.fail("immediate expected");
    return (int)(i64)operand.bits;
  };
  if (!is_integer(F->a_type)) {
    F->scale_a = imm(1);
    F->scale_b = imm(1);
    if (bits_of(F->a_type) == 16) {
      if (!F->a_in_registers) F->trans_a = imm(0);
      F->trans_b = imm(0);
    }
  }
  for (auto& x : D) ids.push_back(lowering.destination(x, kB32));
  ids.insert(ids.end(), src.begin(), src.end());
  Instruction& instruction = lowering.emit(execute_wgmma, kClassWgmma, ids, F->c_count);
  instruction.aux = F;
  instruction.reads_destination = true;
  instruction.propagates_taint = true;
  collect_warp(instruction);
}

static const Opcodes kOpcodes{{"wgmma.fence", lower_wg_fence},
                              {"wgmma.commit_group", lower_wg_commit},
                              {"wgmma.wait_group", lower_wg_wait},
                              {"wgmma.mma_async", lower_wgmma}};
}  // namespace ptxsim
