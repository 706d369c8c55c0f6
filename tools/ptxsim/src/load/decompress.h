// The two compressions of PTX in fat binaries.
#pragma once
#include "common.h"

namespace ptxsim {
// An LZ4 block. Returns false when it does not unpack to the given number of bytes.
bool decompress_lz4(const u8* data, size_t size, size_t unpacked_size, std::string& result);
// zstd, by the library of the system. Returns false and says why when that fails.
bool decompress_zstd(const u8* data, size_t size, size_t unpacked_size, std::string& result,
                     std::string& why);
}  // namespace ptxsim
