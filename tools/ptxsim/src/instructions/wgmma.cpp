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
    const u32* words = warp.source<u32>(operands[r]);
    for (int lane = 0; lane < 32; lane++)
      memcpy(tiles.a + ((lane >> 2) + 8 * (r & 1)) * tiles.row_bytes +
                 ((r >> 1) * 4 * count + (lane & 3) * count) * tiles.element_bytes,
             &words[lane], 4);
    if (!taint_on(warp)) continue;
    u32 tainted = taint_lanes(warp, operands[r]);
    for (int lane = 0; lane < 32; lane++)
      if ((tainted >> lane) & 1) tiles.bad_a[(lane >> 2) + 8 * (r & 1)] = 1;
  }
}

// Init check: an element of D depends on its row of A, its column of B and its old value.
static void taint_wgmma(Warp& warp, const Instruction& instruction, const Tiles& tiles) {
  u32 any = 0;
  for (u8 bad : tiles.bad_a) any |= bad;
  for (u8 bad : tiles.bad_b) any |= bad;
  u32 origin =
      any ? taint_origin(warp, instruction, kShared, (tiles.b_descriptor & 0x3fff) << 4) : 0;
  bool packed = tiles.info.d_type == kF16;
  for (int r = 0; r < tiles.info.c_count; r++) {
    u32 tainted = tiles.accumulates ? taint_lanes(warp, tiles.d[r]) : 0;
    u32 source = tainted ? taint_origin_of(warp, tiles.d[r]) : origin;
    for (int lane = 0; any && lane < 32; lane++) {
      int row = (lane >> 2) + 8 * (packed ? r & 1 : (r >> 1) & 1);
      int column = (packed ? r / 2 : r / 4) * 8 + (lane & 3) * 2 + (packed ? 0 : r & 1);
      if (tiles.bad_a[row] || tiles.bad_b[column] || (packed && tiles.bad_b[column + 1]))
        tainted |= 1u << lane;
    }
    set_taint(warp, tiles.d[r], kFullMask, tainted, source);
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
  auto widen = [](u8 a, Type type) { return type == kS8 ? (i16)(i8)a : (i16)a; };
  alignas(64) i16 A[16][32], B[256][32];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 32; k++) A[i][k] = widen(tiles.a[i * 32 + k], info.a_type);
  for (int i = 0; i < info.n; i++)
    for (int k = 0; k < 32; k++) B[i][k] = widen(tiles.b[i * 32 + k], info.b_type);
  for (int columns = 0; columns < info.n / 8; columns++) {
    i32 D[16][8];
    for (int i = 0; i < 16; i++)
      for (int n = 0; n < 8; n++) {
        i32 sum = 0;
        const i16 *a = A[i], *b = B[columns * 8 + n];
        for (int k = 0; k < 32; k++) sum += (i32)a[k] * b[k];
        D[i][n] = sum;
      }
    for (int r = 0; r < 4; r++) {
      i32* destination = warp.destination<i32>(tiles.d[columns * 4 + r]);
      for (int lane = 0; lane < 32; lane++) {
        i64 sum = D[(lane >> 2) + 8 * (r >> 1)][(lane & 3) * 2 + (r & 1)];
        if (tiles.accumulates) sum += destination[lane];
        destination[lane] = info.saturate ? saturated(sum) : (i32)sum;
      }
    }
  }
}

// Adds eight columns of sums to accumulators of two halves.
static void add_to_halves(Warp& warp, const Tiles& tiles, int columns, const double (*D)[8]) {
  for (int r = 0; r < 2; r++) {
    u32* destination = warp.destination<u32>(tiles.d[columns * 2 + r]);
    for (int lane = 0; lane < 32; lane++) {
      u32 word = 0;
      for (int half = 0; half < 2; half++) {
        double old = tiles.accumulates
                         ? (double)half_bits_to_float((u16)(destination[lane] >> (16 * half)))
                         : 0.0;
        double sum = old + D[(lane >> 2) + 8 * r][(lane & 3) * 2 + half];
        word |= (u32)(u16)to_small(sum, kSmallF16) << (16 * half);
      }
      destination[lane] = word;
    }
  }
}

static void add_to_floats(Warp& warp, const Tiles& tiles, int columns, const double (*D)[8]) {
  for (int r = 0; r < 4; r++) {
    float* destination = warp.destination<float>(tiles.d[columns * 4 + r]);
    for (int lane = 0; lane < 32; lane++) {
      double sum = D[(lane >> 2) + 8 * (r >> 1)][(lane & 3) * 2 + (r & 1)];
      if (tiles.accumulates) sum += destination[lane];
      destination[lane] = canonical_nan((float)sum);
    }
  }
}

static void multiply_floats(Warp& warp, const Tiles& tiles) {
  const MmaInfo& info = tiles.info;
  auto decode = [&](const u8* tile, int row, int k, Type type) {
    u32 bits = 0;
    memcpy(&bits, tile + row * tiles.row_bytes + k * tiles.element_bytes,
           (size_t)tiles.element_bytes);
    return decode_float(bits, 0, type);
  };
  alignas(64) float A[16][32], B[256][32];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < info.k; k++)
      A[i][k] = (float)info.scale_a * decode(tiles.a, i, k, info.a_type);
  for (int i = 0; i < info.n; i++)
    for (int k = 0; k < info.k; k++)
      B[i][k] = (float)info.scale_b * decode(tiles.b, i, k, info.b_type);
  for (int columns = 0; columns < info.n / 8; columns++) {
    double D[16][8];
    for (int i = 0; i < 16; i++)
      for (int n = 0; n < 8; n++) {
        double sum = 0;
        for (int k = 0; k < info.k; k++) sum += (double)A[i][k] * B[columns * 8 + n][k];
        D[i][n] = sum;
      }
    if (info.d_type == kF16)
      add_to_halves(warp, tiles, columns, D);
    else
      add_to_floats(warp, tiles, columns, D);
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
  size_t first = (size_t)(warp.id & ~3);
  for (size_t id = first; id < first + 4 && id < warp.cta->warps.size(); id++)
    if (warp.cta->warps[id].alive && warp.cta->warps[id].wgmma_group < need) return false;
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
  size_t first = (size_t)(warp.id & ~3);
  if (warp.wgmma_group > instruction.imm)
    for (size_t id = first; id < first + 4 && id < warp.cta->warps.size(); id++)
      clock_acquire(warp, warp.cta->warps[id].wgmma_clock);
  size_t kept = 0;
  for (size_t id = 0; id < warp.wgmma_reads.size(); id++) {
    auto read = warp.wgmma_reads[id];
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
  auto* info = new MmaInfo;
  if (!parse_shape(statement, info->m, info->n, info->k)) lowering.unsupported();
  auto types = lowering.types();
  if (types.size() != 3) lowering.unsupported();
  info->d_type = types[0];
  info->a_type = types[1];
  info->b_type = types[2];
  info->saturate = statement.has("satfinite");
  if (bits_of(info->a_type) < 8 || bits_of(info->a_type) * info->k != 256) lowering.unsupported();
  info->c_count = info->d_type == kF16 ? info->n / 4 : info->n / 2;
  info->a_in_registers = statement.operands[1].kind == Operand::kVector;
  return info;
}

static void lower_wgmma(Lowering& lowering, const Statement& statement) {
  MmaInfo* info = wgmma_info(lowering, statement);
  auto D = elements_of(statement.operands[0]);
  if ((int)D.size() != info->c_count) lowering.fail("accumulator count does not fit the shape");
  std::vector<i32> sources, ids;
  if (info->a_in_registers) {
    if (statement.operands[1].elements.size() != 4)
      lowering.fail("A fragment of 4 registers expected");
    for (auto& operand : statement.operands[1].elements)
      sources.push_back(lowering.source(operand, kB32));
  } else
    sources.push_back(lowering.source(statement.operands[1], kB64));
  sources.push_back(lowering.source(statement.operands[2], kB64));
  size_t next = 3;
  sources.push_back(statement.operands.size() > next
                        ? lowering.predicate_source(statement.operands[next])
                        : lowering.constant_predicate(true));
  next++;
  auto immediate = [&](int otherwise) -> int {
    if (next >= statement.operands.size()) return otherwise;
    const Operand& operand = statement.operands[next++];
    if (operand.kind != Operand::kInteger) lowering.fail("immediate expected");
    return (int)(i64)operand.bits;
  };
  if (!is_integer(info->a_type)) {
    info->scale_a = immediate(1);
    info->scale_b = immediate(1);
    if (bits_of(info->a_type) == 16) {
      if (!info->a_in_registers) info->trans_a = immediate(0);
      info->trans_b = immediate(0);
    }
  }
  for (auto& operand : D) ids.push_back(lowering.destination(operand, kB32));
  ids.insert(ids.end(), sources.begin(), sources.end());
  Instruction& instruction = lowering.emit(execute_wgmma, kClassWgmma, ids, info->c_count);
  instruction.aux = info;
  instruction.reads_destination = true;
  instruction.propagates_taint = true;
  collect_warp(instruction);
}

static const Opcodes kOpcodes{{"wgmma.fence", lower_wg_fence},
                              {"wgmma.commit_group", lower_wg_commit},
                              {"wgmma.wait_group", lower_wg_wait},
                              {"wgmma.mma_async", lower_wgmma}};
}  // namespace ptxsim
