// What a kernel launcher returns. Public ring: no torch, no CUTLASS, compiles with a plain C++
// compiler.
#pragma once

#include <cstdint>

// Declared as in the CUDA headers, so that callers can name a stream without the toolkit.
typedef struct CUstream_st* cudaStream_t;

// The library hides all other symbols: these are its C interface.
#define SQK_EXPORT __attribute__((visibility("default")))

namespace sqk {

// Codes below kCudaBase are ours; kCudaBase + e is the CUDA error e. So one number crosses the C
// interface and still says all that an error message needs.
enum class Status : int32_t {
  kSuccess = 0,
  kInvalidArgument = 1,   // a size, stride or pointer that a header's comment rules out
  kUnsupportedArch = 2,   // no kernel of this library runs on the current GPU
  kUnsupportedShape = 3,  // a valid problem that no kernel of this library can compute
  kWorkspaceTooSmall = 4,
  kExcludedTile = 5,  // SQK_WITHOUT_TILES excludes the tile that was asked for, or all that fit
  kUnknownTile = 6,   // SQK_WITHOUT_TILES names a tile that no table of this library has
  kCudaBase = 10000,
};

inline Status status_from_cuda(int32_t error) {
  return error == 0 ? Status::kSuccess
                    : static_cast<Status>(static_cast<int32_t>(Status::kCudaBase) + error);
}

inline bool is_cuda_error(Status status) {
  return static_cast<int32_t>(status) > static_cast<int32_t>(Status::kCudaBase);
}

// An explanation for users, such as "CUDA error 209 (cudaErrorNoKernelImageForDevice): ...". The
// pointer is valid until the same thread calls this again.
const char* describe(Status status);

}  // namespace sqk
