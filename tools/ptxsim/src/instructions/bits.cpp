// Bit fields, permutations and counts.
#include <type_traits>

#include "instructions/integer.h"

namespace ptxsim {
template <class T>
static T bfe(T a, u32 b, u32 c) {
  constexpr int msb = 8 * sizeof(T) - 1;
  u32 pos = b & 0xff, len = c & 0xff;
  if (len == 0) return 0;
  typedef Unsigned<T> U;
  U result = 0, bits = (U)a;
  bool sign = false;
  if (std::is_signed_v<T>) {
    u32 sign_position = pos + len - 1;
    if (sign_position > (u32)msb) sign_position = msb;
    sign = (bits >> sign_position) & 1;
  }
  if (pos <= (u32)msb) result = bits >> pos;
  if (len <= (u32)msb) result &= (((U)1) << len) - 1;
  u32 avail = pos > (u32)msb ? 0 : msb + 1 - pos;
  u32 have = len < avail ? len : avail;
  if (sign && have <= (u32)msb) result |= ~((((U)1) << have) - 1);
  return (T)result;
}
template <class T>
static T bfi(T a, T b, u32 c, u32 d) {
  constexpr u32 kBits = 8 * sizeof(T);
  u32 pos = c & 0xff, len = d & 0xff;
  if (pos >= kBits || len == 0) return b;
  T mask = len >= kBits ? ~(T)0 : (T)((((T)1) << len) - 1);
  mask = (T)(mask << pos);
  return (T)((b & ~mask) | ((a << pos) & mask));
}
static u32 prmt(u32 a, u32 b, u32 c) {
  u64 bytes = ((u64)b << 32) | a;
  u32 result = 0;
  for (int k = 0; k < 4; k++) {
    u32 selector = (c >> (4 * k)) & 0xf;
    u32 byte = (u32)(bytes >> (8 * (selector & 7))) & 0xff;
    if (selector & 8) byte = (byte & 0x80) ? 0xff : 0;
    result |= byte << (8 * k);
  }
  return result;
}
static u32 prmt_mode(const Instruction& instruction, u32 a, u32 b, u32 c) {
  c &= 3;
  static const u16 selectors[6][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543}, {0x3210, 0x2107, 0x1076, 0x0765},
      {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
      {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
  return prmt(a, b, selectors[instruction.imm][c]);
}
// imm: clamp, not wrap.
template <bool kLeft>
static void execute_shf(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32 *a = warp.source<u32>(instruction.operands[1]),
            *b = warp.source<u32>(instruction.operands[2]),
            *c = warp.source<u32>(instruction.operands[3]);
  for_each_lane(lanes, [&](int lane) {
    u32 count = instruction.imm ? (c[lane] > 32 ? 32 : c[lane]) : c[lane] & 31;
    u64 both = ((u64)b[lane] << 32) | a[lane];
    destination[lane] = kLeft ? (count == 32 ? a[lane] : (u32)((both << count) >> 32))
                              : (count == 32 ? b[lane] : (u32)(both >> count));
  });
}
template <class T>
static u32 find_leading(const Instruction& instruction, T a) {
  typedef Unsigned<T> U;
  U bits = (U)a;
  if (std::is_signed_v<T> && a < 0) bits = ~bits;
  if (!bits) return ~0u;
  u32 position = sizeof(T) == 8 ? 63 - __builtin_clzll(bits) : 31 - __builtin_clz((u32)bits);
  return instruction.imm ? 8 * sizeof(T) - 1 - position : position;
}
static u32 brev32(u32 x) {
  x = __builtin_bswap32(x);
  x = ((x & 0x0f0f0f0fu) << 4) | ((x >> 4) & 0x0f0f0f0fu);
  x = ((x & 0x33333333u) << 2) | ((x >> 2) & 0x33333333u);
  return ((x & 0x55555555u) << 1) | ((x >> 1) & 0x55555555u);
}
static u64 brev64(u64 x) { return ((u64)brev32((u32)x) << 32) | brev32((u32)(x >> 32)); }
static u32 find_nth_set(u32 mask, u32 base, i32 off) {
  if (base > 31) return ~0u;
  if (off == 0) return (mask >> base) & 1 ? base : ~0u;
  int step = off > 0 ? 1 : -1, n = off > 0 ? off : -off, pos = (int)base;
  for (; pos >= 0 && pos < 32; pos += step)
    if ((mask >> pos) & 1 && --n == 0) return (u32)pos;
  return ~0u;
}
static u32 bmsk(const Instruction& instruction, u32 a, u32 b) {
  u32 position = a, length = b;
  if (instruction.imm) {
    position &= 31;
    length &= 31;
  } else {
    if (position > 31) return 0;
    if (length > 32) length = 32;
  }
  u64 mask = length >= 32 ? 0xffffffffull : (1ull << length) - 1;
  return (u32)(mask << position);
}
static void execute_szext(Warp& warp, const Instruction& instruction, u32 lanes) {
  u32* destination = warp.destination<u32>(instruction.operands[0]);
  const u32 *a = warp.source<u32>(instruction.operands[1]),
            *b = warp.source<u32>(instruction.operands[2]);
  for_each_lane(lanes, [&](int lane) {
    u32 n = instruction.imm ? b[lane] & 31 : b[lane];
    u32 x = a[lane];
    if (n >= 32)
      destination[lane] = x;
    else if (n == 0)
      destination[lane] = 0;
    else {
      x &= (1u << n) - 1;
      if (instruction.imm2 && (x >> (n - 1) & 1)) x |= ~((1u << n) - 1);
      destination[lane] = x;
    }
  });
}

static void lower_shf(Lowering& lowering, const Statement& statement) {
  emit_simple(lowering, statement.has("l") ? execute_shf<true> : execute_shf<false>, kClassInteger,
              kB32, {kB32, kB32, kU32});
  lowering.kernel.code.back().imm = statement.has("clamp");
}

static void lower_prmt(Lowering& lowering, const Statement& statement) {
  static const char* modes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  int mode = -1;
  for (int k = 0; k < 6; k++)
    if (statement.has(modes[k])) mode = k;
  if (mode < 0)
    emit_simple(lowering, ternary<u32, u32, u32, u32, prmt>, kClassInteger, kB32,
                {kB32, kB32, kB32});
  else {
    emit_simple(lowering, ternary_modified<u32, u32, prmt_mode>, kClassInteger, kB32,
                {kB32, kB32, kB32});
    lowering.kernel.code.back().imm = (u32)mode;
  }
}

static void lower_bfe(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  Handler handler = type == kU32   ? ternary<u32, u32, u32, u32, bfe<u32>>
                    : type == kS32 ? ternary<i32, i32, u32, u32, bfe<i32>>
                    : type == kU64 ? ternary<u64, u64, u32, u32, bfe<u64>>
                                   : ternary<i64, i64, u32, u32, bfe<i64>>;
  emit_simple(lowering, handler, kClassInteger, type, {type, kU32, kU32});
}

template <class T>
static void execute_bfi(Warp& warp, const Instruction& instruction, u32 lanes) {
  T* destination = warp.destination<T>(instruction.operands[0]);
  const T *a = warp.source<T>(instruction.operands[1]),
          *b = warp.source<T>(instruction.operands[2]);
  const u32 *position = warp.source<u32>(instruction.operands[3]),
            *length = warp.source<u32>(instruction.operands[4]);
  for_each_lane(lanes, [&](int lane) {
    destination[lane] = bfi<T>(a[lane], b[lane], position[lane], length[lane]);
  });
}

static void lower_bfi(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering, type_bytes(type) == 8 ? execute_bfi<u64> : execute_bfi<u32>, kClassInteger,
              type, {type, type, kU32, kU32});
}

static void lower_bmsk(Lowering& lowering, const Statement& statement) {
  emit_simple(lowering, binary_modified<u32, u32, bmsk>, kClassInteger, kB32, {kB32, kB32});
  lowering.kernel.code.back().imm = statement.has("wrap");
}

static void lower_szext(Lowering& lowering, const Statement& statement) {
  emit_simple(lowering, execute_szext, kClassInteger, kB32, {kB32, kB32});
  lowering.kernel.code.back().imm = statement.has("wrap");
  lowering.kernel.code.back().imm2 = lowering.last_type() == kS32;
}

static void lower_brev(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering, type_bytes(type) == 8 ? unary<u64, u64, brev64> : unary<u32, u32, brev32>,
              kClassInteger, type, {type});
}

static void lower_popc(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering,
              type_bytes(type) == 8
                  ? unary<u32, u64, [](u64 a) { return (u32)__builtin_popcountll(a); }>
                  : unary<u32, u32, [](u32 a) { return (u32)__builtin_popcount(a); }>,
              kClassInteger, kU32, {type});
}

static void lower_clz(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  emit_simple(lowering,
              type_bytes(type) == 8
                  ? unary<u32, u64, [](u64 a) { return a ? (u32)__builtin_clzll(a) : 64u; }>
                  : unary<u32, u32, [](u32 a) { return a ? (u32)__builtin_clz(a) : 32u; }>,
              kClassInteger, kU32, {type});
}

static void lower_bfind(Lowering& lowering, const Statement& statement) {
  Type type = lowering.last_type();
  Handler handler = type == kU32   ? unary_modified<u32, u32, find_leading<u32>>
                    : type == kS32 ? unary_modified<u32, i32, find_leading<i32>>
                    : type == kU64 ? unary_modified<u32, u64, find_leading<u64>>
                                   : unary_modified<u32, i64, find_leading<i64>>;
  emit_simple(lowering, handler, kClassInteger, kU32, {type});
  lowering.kernel.code.back().imm = statement.has("shiftamt");
}

static void lower_fns(Lowering& lowering, const Statement& statement) {
  emit_simple(lowering, ternary<u32, u32, u32, i32, find_nth_set>, kClassInteger, kB32,
              {kB32, kB32, kS32});
}

static const Opcodes kOpcodes{{"shf", lower_shf},     {"prmt", lower_prmt}, {"bfe", lower_bfe},
                              {"bfi", lower_bfi},     {"bmsk", lower_bmsk}, {"szext", lower_szext},
                              {"brev", lower_brev},   {"popc", lower_popc}, {"clz", lower_clz},
                              {"bfind", lower_bfind}, {"fns", lower_fns}};
}  // namespace ptxsim
