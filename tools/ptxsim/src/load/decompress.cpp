#include "load/decompress.h"

#include <dlfcn.h>

namespace ptxsim {
namespace {
struct Reader {
  const u8* data;
  size_t size, position = 0;

  bool has(size_t bytes) const { return position + bytes <= size; }
  // A length of 4 bits: 15 means that bytes follow, up to one that is not 255.
  bool read_length(size_t nibble, size_t& length) {
    length = nibble;
    if (nibble != 15) return true;
    u8 byte;
    do {
      if (!has(1)) return false;
      byte = data[position++];
      length += byte;
    } while (byte == 255);
    return true;
  }
};
}  // namespace

bool decompress_lz4(const u8* data, size_t size, size_t unpacked_size, std::string& result) {
  constexpr size_t kMinMatch = 4;
  result.clear();
  result.reserve(unpacked_size);
  Reader reader{data, size};
  while (reader.has(1)) {
    u8 token = data[reader.position++];
    size_t literals, match;
    if (!reader.read_length(token >> 4, literals) || !reader.has(literals)) return false;
    result.append((const char*)data + reader.position, literals);
    reader.position += literals;
    if (!reader.has(1) || result.size() >= unpacked_size) break;
    if (!reader.has(2)) return false;
    size_t distance = data[reader.position] | (data[reader.position + 1] << 8);
    reader.position += 2;
    if (!distance || distance > result.size()) return false;
    if (!reader.read_length(token & 15, match)) return false;
    size_t from = result.size() - distance;
    for (size_t i = 0; i < match + kMinMatch; i++) result += result[from + i];  // may overlap
  }
  return result.size() == unpacked_size;
}

bool decompress_zstd(const u8* data, size_t size, size_t unpacked_size, std::string& result,
                     std::string& why) {
  static void* library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    why = "the PTX is zstd-compressed and libzstd.so.1 is not on this machine";
    return false;
  }
  typedef size_t (*Decompress)(void*, size_t, const void*, size_t);
  auto decompress = (Decompress)dlsym(library, "ZSTD_decompress");
  if (!decompress) {
    why = "libzstd.so.1 lacks ZSTD_decompress";
    return false;
  }
  result.resize(unpacked_size);
  if (decompress(&result[0], unpacked_size, data, size) != unpacked_size) {
    why = "zstd decompression failed";
    return false;
  }
  return true;
}
}  // namespace ptxsim
