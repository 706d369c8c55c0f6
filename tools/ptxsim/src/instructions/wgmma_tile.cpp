#include "instructions/wgmma_tile.h"

#include "checks.h"

namespace ptxsim {
struct MatrixDescriptor {
  u32 start, leading_offset, stride_offset, base;  // bytes
  u32 swizzle;                                     // 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
  explicit MatrixDescriptor(u64 d)
      : start((u32)(d & 0x3fff) << 4),
        leading_offset((u32)((d >> 16) & 0x3fff) << 4),
        stride_offset((u32)((d >> 32) & 0x3fff) << 4),
        base((u32)(d >> 49) & 7),
        swizzle((u32)(d >> 62)) {}
};
static inline u32 swizzle(u32 a, u32 mode) {
  switch (mode) {
    case 1:
      return a ^ (((a >> 7) & 7) << 4);
    case 2:
      return a ^ (((a >> 7) & 3) << 4);
    case 3:
      return a ^ (((a >> 7) & 1) << 4);
    default:
      return a;
  }
}

namespace {
struct TileReader {
  Warp& warp;
  const TileRows& rows;
  MatrixDescriptor descriptor;
  u8* out;
  bool check;
  u8* bad;

  const u8* chunk(u32 address);
  void note_bytes(int row, const u8* p, int n);
  void read_k_major();
  void read_mn_major();
};
}  // namespace

// 16 bytes of shared memory.
const u8* TileReader::chunk(u32 address) {
  Cta& cta = *warp.cta;
  u32 a = swizzle(address, descriptor.swizzle);
  if (a < cta.shared_begin || a + 16 > cta.shared_end)
    warp.fail(kErrorAddress, 0,
              format("wgmma operand at shared address 0x%x lies outside the CTA's shared memory "
                     "(0x%x..0x%x); descriptor 0x%016llx (start 0x%x, leading %u, stride %u, "
                     "swizzle mode %u)",
                     a, cta.shared_begin, cta.shared_end, (unsigned long long)rows.descriptor,
                     descriptor.start, descriptor.leading_offset, descriptor.stride_offset,
                     descriptor.swizzle));
  if (cta.shadow && check && warp.launch->check_race)
    race_access(warp, 0, cta, a, 16, false, false);
  return cta.shared + a;
}

void TileReader::note_bytes(int row, const u8* p, int n) {
  if (bad && !bytes_init(warp, 0, kShared, (u64)(p - warp.cta->shared), (u32)n)) bad[row] = 1;
}

void TileReader::read_k_major() {
  const MatrixDescriptor& d = descriptor;
  u32 pitch = d.swizzle == 1 ? 128 : d.swizzle == 2 ? 64 : d.swizzle == 3 ? 32 : 16;
  for (int r = 0; r < rows.count; r++) {
    u32 row = (u32)(rows.first + r);
    u32 base = d.start + (row / 8) * d.stride_offset + (row % 8) * pitch;
    for (int k = 0; k < rows.row_bytes; k += 16) {
      const u8* p = chunk(d.swizzle ? base + (u32)k : base + (u32)(k / 16) * d.leading_offset);
      memcpy(out + r * rows.row_bytes + k, p, 16);
      note_bytes(r, p, 16);
    }
  }
}

// A chunk holds 16 / element_bytes consecutive rows of one k.
void TileReader::read_mn_major() {
  const MatrixDescriptor& d = descriptor;
  int size = rows.element_bytes, in_chunk = 16 / size, K = rows.row_bytes / size;
  // chunks in a row of the swizzle pattern
  u32 width = d.swizzle == 1 ? 8 : d.swizzle == 2 ? 4 : d.swizzle == 3 ? 2 : 1;
  int end = (rows.first + rows.count + in_chunk - 1) / in_chunk;
  for (int c = rows.first / in_chunk; c < end; c++)
    for (int k = 0; k < K; k++) {
      u32 a;
      if (d.swizzle == 0)
        a = d.start + (u32)c * d.stride_offset + (u32)(k % 8) * 16 +
            (u32)(k / 8) * d.leading_offset;
      else
        a = d.start + ((u32)c % width) * 16 + ((u32)c / width) * d.leading_offset +
            (u32)(k % 8) * 16 * width + (u32)(k / 8) * d.stride_offset;
      const u8* p = chunk(a);
      for (int e = 0; e < in_chunk; e++) {
        int r = c * in_chunk + e - rows.first;
        if (r < 0 || r >= rows.count) continue;
        memcpy(out + r * rows.row_bytes + k * size, p + e * size, (size_t)size);
        note_bytes(r, p + e * size, size);
      }
    }
}

void fetch_tile(Warp& warp, const TileRows& rows, u8* out, bool check, u8* bad) {
  TileReader reader{warp, rows, MatrixDescriptor(rows.descriptor), out, check, bad};
  if (reader.descriptor.base)
    warp.fail(kErrorLaunch, 0, "wgmma descriptors with a non-zero base offset are not supported");
  if (rows.transposed)
    reader.read_mn_major();
  else
    reader.read_k_major();
}

u64 hash_tile(const u8* p, size_t n) {
  u64 h = 1469598103934665603ull;
  for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 1099511628211ull;
  return h;
}
}  // namespace ptxsim
