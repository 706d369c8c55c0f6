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
static inline u32 swizzle(u32 address, u32 mode) {
  switch (mode) {
    case 1:
      return address ^ (((address >> 7) & 7) << 4);
    case 2:
      return address ^ (((address >> 7) & 3) << 4);
    case 3:
      return address ^ (((address >> 7) & 1) << 4);
    default:
      return address;
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
  void note_bytes(int row, const u8* data, int bytes);
  void read_k_major();
  void read_mn_major();
};
}  // namespace

// 16 bytes of shared memory.
const u8* TileReader::chunk(u32 address) {
  Cta& cta = *warp.cta;
  u32 swizzled = swizzle(address, descriptor.swizzle);
  if (swizzled < cta.shared_begin || swizzled + 16 > cta.shared_end)
    warp.fail(kErrorAddress, 0,
              format("wgmma operand at shared address 0x%x lies outside the CTA's shared memory "
                     "(0x%x..0x%x); descriptor 0x%016llx (start 0x%x, leading %u, stride %u, "
                     "swizzle mode %u)",
                     swizzled, cta.shared_begin, cta.shared_end,
                     (unsigned long long)rows.descriptor, descriptor.start,
                     descriptor.leading_offset, descriptor.stride_offset, descriptor.swizzle));
  if (cta.shadow && check && warp.launch->check_race)
    race_access(warp, 0, cta, swizzled, 16, false, false);
  return cta.shared + swizzled;
}

void TileReader::note_bytes(int row, const u8* data, int bytes) {
  if (bad && !bytes_init(warp, 0, kShared, (u64)(data - warp.cta->shared), (u32)bytes))
    bad[row] = 1;
}

void TileReader::read_k_major() {
  const MatrixDescriptor& d = descriptor;
  u32 pitch = d.swizzle == 1 ? 128 : d.swizzle == 2 ? 64 : d.swizzle == 3 ? 32 : 16;
  for (int i = 0; i < rows.count; i++) {
    u32 row = (u32)(rows.first + i);
    u32 base = d.start + (row / 8) * d.stride_offset + (row % 8) * pitch;
    for (int k = 0; k < rows.row_bytes; k += 16) {
      const u8* data = chunk(d.swizzle ? base + (u32)k : base + (u32)(k / 16) * d.leading_offset);
      memcpy(out + i * rows.row_bytes + k, data, 16);
      note_bytes(i, data, 16);
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
  for (int chunk_index = rows.first / in_chunk; chunk_index < end; chunk_index++)
    for (int k = 0; k < K; k++) {
      u32 address;
      if (d.swizzle == 0)
        address = d.start + (u32)chunk_index * d.stride_offset + (u32)(k % 8) * 16 +
                  (u32)(k / 8) * d.leading_offset;
      else
        address = d.start + ((u32)chunk_index % width) * 16 +
                  ((u32)chunk_index / width) * d.leading_offset + (u32)(k % 8) * 16 * width +
                  (u32)(k / 8) * d.stride_offset;
      const u8* data = chunk(address);
      for (int i = 0; i < in_chunk; i++) {
        int r = chunk_index * in_chunk + i - rows.first;
        if (r < 0 || r >= rows.count) continue;
        memcpy(out + r * rows.row_bytes + k * size, data + i * size, (size_t)size);
        note_bytes(r, data + i * size, size);
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

u64 hash_tile(const u8* data, size_t bytes) {
  u64 hash = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ data[i]) * 1099511628211ull;
  return hash;
}
}  // namespace ptxsim
